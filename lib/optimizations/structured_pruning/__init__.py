"""Structured pruning: the method and its measurement."""
