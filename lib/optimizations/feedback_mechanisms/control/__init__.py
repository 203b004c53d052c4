"""Control laws, and the rules for when a limit may move."""
