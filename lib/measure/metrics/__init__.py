"""Metrics, measurements, paired statistics, efforts and dimensions."""
