"""Comparison systems of the paper's Table 3, trained by the package's own loop. No part of the product: may go whole.

The third of them, latent diffusion without MAISI's conditions, needs no code here: it is the diffusion stage with
`region_input`, `spacing_input` and `num_modalities` off.
"""
