"""What keeps imports quick. Knows nothing of what is imported."""

import sys


def refuse_address_grammars() -> None:
    """Before jsonschema is imported, itself or by a library: keep it from building grammars for seconds, which check a
    kind of address that neither notebooks nor results hold. Without them it leaves such addresses unchecked.
    """
    sys.modules.setdefault("rfc3987_syntax", None)
