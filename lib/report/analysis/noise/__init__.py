"""What noise does to a whole result set: busy runs, variance between processes, false discoveries, flipped verdicts."""
