"""What build.py runs: plan, cache, run, and store."""
