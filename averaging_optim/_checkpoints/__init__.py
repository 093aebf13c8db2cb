"""Averages in state dicts: of an optimizer, and of a model."""
