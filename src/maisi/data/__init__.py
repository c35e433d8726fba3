"""From files to what networks eat: preprocessing, regions, segmentation, phantoms, case lists, latents."""
