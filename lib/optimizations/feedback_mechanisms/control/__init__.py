"""The laws of control, and when a limit moves at all."""
