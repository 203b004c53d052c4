"""What replacements of parts cost one request: seconds, measured, and bytes."""
