"""The parts of replays of the real model: servers that take turns, and the rounds in which arms were served."""
