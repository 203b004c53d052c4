"""Costs of replacement parts for one request: measured seconds, and bytes."""
