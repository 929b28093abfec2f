"""Evaluation: what an adapter is worth, measured on the live runtime.

Takes: a runtime, a task, rows, a reference (or the bare base). Gives: answers and metrics, and proof of effect.
Never: trains, stores or merges.
"""
