"""Exporting: what a reader elsewhere would refuse or silently scale wrongly, and the adapter rewritten so that it does not.

Takes: an adapter and the name of a reader. Gives: findings, and files that this reader computes with rightly.
Never: writes what its reader would misread, or hides what a rewriting cost.
"""
