"""From a record's numbers to its verdict: the primary measurement of each dimension, and sentences."""
