"""How a number is made: time, memory, energy, cost, quality, statistics."""
