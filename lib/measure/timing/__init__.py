"""Interleaved timing of workloads, and what disturbed it."""
