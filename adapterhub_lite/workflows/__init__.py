"""Workflows: the arrows between the rooms; what one line of Python or one command does from end to end.

Takes: recipes and references. Gives: stored versions, merged checkpoints, figures.
Never: holds knowledge of its own about models, formats or tasks; it calls the rooms in order.
"""
