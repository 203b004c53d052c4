"""Tensor decomposition: the method and its measurement."""
