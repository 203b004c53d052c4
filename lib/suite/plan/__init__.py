"""What is to be run: requests, templates, dependencies, cache keys."""
