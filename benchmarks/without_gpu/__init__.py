"""Measurements of a CUDA machine's host and compiler that need no GPU (see README.md)."""
