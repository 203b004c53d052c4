"""What follows from many records: headlines, ranking, comparison, acceptance."""
