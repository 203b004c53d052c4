"""Noise in a whole result set: busy runs, variance between processes, false discoveries, flipped verdicts."""
