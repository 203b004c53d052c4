"""Interleaved timing of workloads, in this or in fresh processes, and detection of disturbances."""
