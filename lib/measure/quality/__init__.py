"""Answers of both arms, paired per item, and verdicts of non-inferiority."""
