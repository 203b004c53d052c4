"""Checks for records that cannot be trusted: numbers without a source, verdicts that contradict their own fields."""
