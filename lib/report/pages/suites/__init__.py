"""The files that the suites write into a result folder: JSON, Markdown and the execution report."""
