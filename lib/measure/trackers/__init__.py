"""Trackers of what a run costs (memory, energy, CPU) and of the environment in which it ran."""
