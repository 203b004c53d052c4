"""From a record's numbers to its words: which measurement carries a dimension, and the verdict."""
