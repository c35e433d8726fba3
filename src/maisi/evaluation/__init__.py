"""Measures of images and of models."""
