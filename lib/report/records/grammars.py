"""Keeps jsonschema from spending seconds on building grammars when it, or a library that uses it, is imported. The
grammars check a kind of address that occurs in neither notebooks nor results; without them it goes unchecked.
"""

import sys
from types import ModuleType


def refuse() -> None:
    """Block the import of the package with these grammars; call this before jsonschema is imported."""
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]  # None blocks an import
    modules.setdefault("rfc3987_syntax", None)
