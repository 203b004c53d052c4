"""Statistics of activations on calibration text, and recovery of a changed model by training on the original."""
