"""Analysis of many records: headlines, ranking, comparison, acceptance."""
