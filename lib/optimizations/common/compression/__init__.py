"""Code shared by the compression methods: options, budgets, calibration text, yardsticks of equal size."""
