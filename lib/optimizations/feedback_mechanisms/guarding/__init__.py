"""The guard's parts: the test that it consults, and the answers that are read again for it."""
