"""Keeps jsonschema from building grammars for seconds when it is imported, itself or by a library: they check a kind of
address that neither notebooks nor results hold. Without them it leaves such addresses unchecked.
"""

import sys


def refuse() -> None:
    """Refuse the import of the package that holds them; to be called before jsonschema is imported."""
    sys.modules.setdefault("rfc3987_syntax", None)
