"""Charts as inline SVG that use the page's colours, so that they follow a dark colour scheme."""
