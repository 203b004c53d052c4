"""Speculative decoding of one stream: drafters, laws for the draft's length, and the laws side by side."""
