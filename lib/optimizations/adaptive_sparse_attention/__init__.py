"""Adaptive sparse attention: the method and its measurement."""
