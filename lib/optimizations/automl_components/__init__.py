"""AutoML components: what it does to a model, and how it is measured."""
