"""Feedback mechanisms: the control loops of a server, their rivals, and their measurement."""
