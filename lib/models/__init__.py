"""Models: parameter files, loading, anatomy, tasks and proxy models."""
