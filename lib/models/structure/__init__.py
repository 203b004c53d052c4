"""One view of all supported architectures, and structural changes of models through it."""
