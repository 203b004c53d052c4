"""Checkpoint folders: reading, writing and checking their files, and placing weights in memory."""
