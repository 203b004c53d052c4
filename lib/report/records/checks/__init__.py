"""Records that a reader could not trust: numbers without a source, verdicts that their own fields do not give."""
