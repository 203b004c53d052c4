"""The workbench library: models, measuring, optimizations, reports, and the suite that runs them."""
