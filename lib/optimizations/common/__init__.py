"""Code shared by two or more optimizations."""
