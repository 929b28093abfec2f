"""Combining: sums, interpolations and prunings of adapters, and changes of their form, on thin factors.

Takes: adapters, and weights of a base where a method needs them. Gives: one LoRA adapter, with its error said.
Never: forms a matrix as large as a layer, leaves a module out without a word, or counts a scaling twice.
"""
