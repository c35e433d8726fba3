"""Tensor splitting: a finished network run on feature maps that stay cut along one axis, with the unsplit result."""
