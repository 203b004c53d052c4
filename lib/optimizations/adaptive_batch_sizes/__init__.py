"""Adaptive batch sizes: the serving policy, its rivals, and its measurement."""
