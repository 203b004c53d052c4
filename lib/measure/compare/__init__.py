"""Baseline against optimized: speed, counted resources, memory."""
