"""Predictions from operations and bytes: cost model, measured ceilings, full depth."""
