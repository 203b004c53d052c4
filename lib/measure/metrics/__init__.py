"""The catalogue of metrics, measurements, paired statistics, and the settings of a run."""
