"""What a model is asked: tasks, items, prompts, evaluation text."""
