"""Modular components: composing optimizations, and the measurement of their pairs."""
