"""Reads the user's YAML files, with numbers as in YAML 1.2 and errors in one line. Knows nothing of their keys."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from lib.errors import UserError

EXPONENT = "tag:workbench,number-with-exponent"
MERGE = "tag:yaml.org,2002:merge"  # the key `<<`, which may occur several times


class Loader(yaml.SafeLoader):
    """A loader that reads `1e-6` and `1e6` as numbers (text in YAML 1.1) and refuses duplicate keys.

    Of two sections with the same name, the first would otherwise be lost silently.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the next mapping. Raises ComposerError at a duplicate key."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != MERGE]
        for key in keys:
            if (key.tag, key.value) in seen:
                raise ComposerError(None, None, f'the key "{key.value}" occurs twice', key.start_mark)
            seen.add((key.tag, key.value))
        return node


def _number(_: yaml.SafeLoader, node: yaml.Node) -> int | float:
    """Return `1e6` as the integer 1000000, since it may be a count, and `1e-6` or `1.5e3` as a float."""
    text = str(node.value)
    return int(float(text)) if re.fullmatch(r"[-+]?\d+[eE]\+?\d+", text) else float(text)


Loader.add_implicit_resolver(EXPONENT, re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
Loader.add_constructor(EXPONENT, _number)


def content_of(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises UserError, naming the expected `keys`, if it is unreadable or none."""
    where = f"{path.parent.name}/{path.name}"
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        at = "" if line is None else f", line {line + 1}"
        why = " ".join(str(getattr(error, "problem", None) or error).split())[:120]
        raise UserError(f"{where}{at}: not readable as YAML ({why})") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        fault = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"{where}: {fault}; expected the keys {', '.join(keys)}")
    return content
