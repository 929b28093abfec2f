"""Evaluation: what an adapter is worth, measured on the live runtime.

Takes: a runtime, a task, rows, a reference (or the bare base). Gives: answers and metrics.
Never: trains, stores or merges.
"""
