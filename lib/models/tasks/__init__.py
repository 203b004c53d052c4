"""Tasks, their items and prompts, and evaluation text."""
