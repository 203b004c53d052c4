"""Records: their definition, schema, verdicts and history."""
