"""The guard's parts: its sequential test, the rereading of answers, and what the fast profile saves net of it."""
