"""The setting of a run, read from its record alone: time, machine, model, stack, and the command that repeats it."""
