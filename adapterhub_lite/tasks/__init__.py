"""Tasks: what rows of data mean.

Takes: rows of data and a tokenizer. Gives: token sequences with labels, prompts, decoded answers, metrics.
Never: knows how it is trained or served. A task is one file and one line in `registry`.
"""
