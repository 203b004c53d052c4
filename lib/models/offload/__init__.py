"""Models larger than memory: streaming weights from files, caching experts, changing checkpoints block by block."""
