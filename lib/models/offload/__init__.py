"""Models larger than memory: weights streamed from files, experts cached."""
