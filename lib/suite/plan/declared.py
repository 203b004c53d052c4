"""What an optimization's module declares, read from its source: nothing is imported, so a listing stays quick."""

import ast
from pathlib import Path

from lib.suite.plan.plan import ROOT

OPTIMIZATIONS = ROOT / "lib" / "optimizations"
HELD = {"shapes", "weights", "storage"}  # what a checkpoint can hold of what an optimization touches


def touches(stem: str, folder: Path = OPTIMIZATIONS) -> tuple[str, ...]:
    """Return `COMPOSES["touches"]` of an optimization; empty where it composes with no other, or has no module."""
    for path in (folder / stem / "method.py", folder / f"{stem}.py"):
        if path.is_file():
            return _touches(path.read_text(encoding="utf-8"))
    return ()


def savable(stem: str, folder: Path = OPTIMIZATIONS) -> bool:
    """Return whether `apply` can make a checkpoint of an optimization by itself."""
    return bool(HELD & set(touches(stem, folder)))


def _touches(source: str) -> tuple[str, ...]:
    for node in ast.parse(source).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        named = any(isinstance(target, ast.Name) and target.id == "COMPOSES" for target in targets)
        value = getattr(node, "value", None)
        if named and isinstance(value, ast.Dict):
            for key, entry in zip(value.keys, value.values):
                if isinstance(key, ast.Constant) and key.value == "touches":
                    return tuple(ast.literal_eval(entry))
    return ()
