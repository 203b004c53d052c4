"""The files that the suites leave in a result folder: JSON, Markdown and the execution report."""
