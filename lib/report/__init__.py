"""From record to reader: records, verdicts, figures, pages."""
