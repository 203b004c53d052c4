"""Statistics of activations on calibration text, and teaching a changed model from the unchanged one."""
