"""Layers that several networks share: residual blocks, attention, embeddings."""
