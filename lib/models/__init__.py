"""The four models: parameter files, loading, anatomy, tasks and stand-ins."""
