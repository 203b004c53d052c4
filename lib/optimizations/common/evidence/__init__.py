"""Evidence for a notebook's conclusions: claims, published relations, contributions of parts."""
