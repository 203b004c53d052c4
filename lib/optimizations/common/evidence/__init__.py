"""What a notebook's conclusions rest on: claims, published relations, contributions of parts."""
