"""Training data of the proxy models: batches of text and prompts, and the teacher that labels prompts."""
