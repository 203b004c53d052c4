"""One view of all architectures, and surgery on it."""
