"""The setting of a run, from its record alone: when and where it ran, on which model and stack, by which command."""
