"""Modules that take the place of a model's own: factored, sparse, quantized, and parts that do nothing."""
