"""Native products of a few rows with frozen weights, on a CPU; built where a compiler is at hand.

Takes: dense or quantised weights, float32 rows. Gives: `PackedWeight`, `library`. Never: rounds a weight; is needed.
"""
