"""Checkpoint folders: their files and bytes, read, written, checked, placed in memory."""
