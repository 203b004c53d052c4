"""One module per optimization, named as its notebook."""
