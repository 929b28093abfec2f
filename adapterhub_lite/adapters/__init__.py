"""Adapters: what is trained, stored, swapped and merged.

Takes: a spec, its tensors, the modules of a base. Gives: `Adapter` and its fitted forms (LoRA, DoRA, prefix, head).
Never: guesses a transpose, a missing key or a scale; a tensor fits exactly or is refused.
"""
