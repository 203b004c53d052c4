"""A pytest plugin: nbval runs the templates at effort preview. Every cell is run, on little data; the templates' larger
default effort is for people who open them.
"""

from typing import Any

DEFAULT, PREVIEW = 'effort: str = "quick"', 'effort: str = "preview"'


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Set the parameters cell of every collected notebook to effort preview."""
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is not None and "parameters" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace(DEFAULT, PREVIEW)
