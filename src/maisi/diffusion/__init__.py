"""Diffusion processes and samplers: mathematics with no network in it."""
