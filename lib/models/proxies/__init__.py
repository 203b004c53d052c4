"""Training the proxy models."""
