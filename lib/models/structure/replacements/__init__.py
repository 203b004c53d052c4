"""Modules that replace a model's own: factored, sparse and quantized matrices, and parts that do nothing."""
