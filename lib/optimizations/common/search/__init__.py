"""What the searches share: studies that survive, fronts, choices under noise, quality while choosing."""
