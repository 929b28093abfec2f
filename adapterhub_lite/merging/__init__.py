"""Merging: bake an adapter into a base checkpoint, tensor by tensor, and verify the result.

Takes: an adapter and a checkpoint folder. Gives: a folder that plain transformers loads, with a report beside it.
Never: holds the whole model in memory, leaves an unverified folder that looks finished, or guesses a tensor's place.
"""
