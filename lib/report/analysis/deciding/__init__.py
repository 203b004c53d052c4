"""The inputs of a decision: the goal with its metrics, and whether the scores show that quality is kept."""
