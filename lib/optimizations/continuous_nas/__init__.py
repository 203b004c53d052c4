"""Continuous NAS: the architecture search and its measurement."""
