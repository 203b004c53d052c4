"""How numbers are measured: time, memory, energy, cost, quality, statistics."""
