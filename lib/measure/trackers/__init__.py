"""What a run costs: memory, energy, CPU; and the environment in which it ran."""
