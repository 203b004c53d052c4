"""The four models: parameter files, loading, anatomy, tasks and proxy models."""
