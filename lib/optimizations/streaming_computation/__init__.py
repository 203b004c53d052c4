"""Streaming computation: the method and its measurement."""
