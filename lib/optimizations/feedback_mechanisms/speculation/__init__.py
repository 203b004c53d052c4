"""Speculative decoding of one stream: drafters, laws for the draft length, and a comparison of the laws."""
