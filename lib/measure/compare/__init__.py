"""Compares a baseline with an optimized model: speed, counted resources, memory."""
