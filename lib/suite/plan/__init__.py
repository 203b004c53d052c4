"""Planning of runs: requests, templates, dependencies, cache keys."""
