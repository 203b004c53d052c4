"""Plan, cache, run, and keep: what stands behind build.py."""
