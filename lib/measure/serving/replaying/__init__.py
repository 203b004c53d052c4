"""What replays of the real model consist of: servers that take turns, and the rounds in which arms were served."""
