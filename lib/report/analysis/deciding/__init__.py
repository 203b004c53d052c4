"""What a decision is made of: the goal and what serves it, and what the scores say of quality."""
