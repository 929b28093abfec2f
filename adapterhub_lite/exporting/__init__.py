"""Exporting: what a reader elsewhere would refuse or scale wrongly without a word, and the adapter rewritten for it.

Takes: an adapter and the name of a reader. Gives: findings, and files that this reader computes with rightly.
Never: writes what its reader would misread, or hides what a rewriting cost.
"""
