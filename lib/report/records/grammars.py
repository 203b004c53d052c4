"""Keeps jsonschema from building grammars for seconds when it is imported, itself or by a library: they check a kind of
address that neither notebooks nor results hold. Without them it leaves such addresses unchecked.
"""

import sys
from types import ModuleType


def refuse() -> None:
    """Refuse the import of the package that holds them; to be called before jsonschema is imported."""
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]  # None refuses an import
    modules.setdefault("rfc3987_syntax", None)
