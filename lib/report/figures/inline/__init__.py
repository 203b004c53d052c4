"""Charts as SVG text that stand in a page and take its colours, so that they follow a dark scheme."""
