"""Sparse neural networks: the method and its measurement."""
