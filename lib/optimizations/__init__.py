"""One folder (or module) per optimization, named as its notebook."""
