"""What a run costs: memory, energy, processor; and the environment that it ran in."""
