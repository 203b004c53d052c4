"""What the compressions share: options, budgets, calibration, yardsticks at equal bytes."""
