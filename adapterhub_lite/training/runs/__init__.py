"""A run on disk: what it was begun with, its checkpoints, and its folder in the store."""
