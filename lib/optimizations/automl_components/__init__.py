"""AutoML components: the search over stacks of optimizations, and its measurement."""
