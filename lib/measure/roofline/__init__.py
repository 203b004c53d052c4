"""What operations and bytes predict: cost model, measured ceilings, full depth."""
