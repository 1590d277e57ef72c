"""Checkpoints of other projects, converted to this model's layout."""
