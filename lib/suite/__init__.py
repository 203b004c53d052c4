"""The build behind build.py: plan, cache, run, and store."""
