"""HTML, Markdown and the files of the suites."""
