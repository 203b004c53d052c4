"""Models: parameter files, loading, structure, checkpoints, tasks and proxy models."""
