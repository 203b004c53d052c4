"""What proxy models are trained on: batches of text and prompts, and the teacher that labels them."""
