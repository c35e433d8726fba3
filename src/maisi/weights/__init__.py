"""Weights on disk: the model folder, loading, and conversion of the released files."""
