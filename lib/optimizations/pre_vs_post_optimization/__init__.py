"""Pre vs post optimization: a model before and after its best stack, and the comparison of the two."""
