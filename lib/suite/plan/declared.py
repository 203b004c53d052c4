"""Declarations of an optimization's module, read from its source without importing it, so that listings stay quick."""

import ast
from pathlib import Path

from lib.suite.plan import plan
from lib.suite.plan.plan import ROOT

OPTIMIZATIONS = ROOT / "lib" / "optimizations"
HELD = {"shapes", "weights", "storage"}  # the changes that a checkpoint can store


def touches(stem: str, folder: Path = OPTIMIZATIONS) -> tuple[str, ...]:
    """Return `COMPOSES["touches"]` of an optimization; empty where it declares none or has no module."""
    for path in (folder / stem / "method.py", folder / f"{stem}.py"):
        if path.is_file():
            return _touches(path.read_text(encoding="utf-8"))
    return ()


def savable(stem: str, folder: Path = OPTIMIZATIONS) -> bool:
    """Return whether `apply` can save a checkpoint of this optimization alone."""
    return bool(HELD & set(touches(stem, folder)))


def why_not_savable(stem: str) -> str | None:
    """Return why `apply` cannot save a checkpoint of this optimization alone; None where it can, or where `stem` is not
    an optimization.

    Refusals that depend on the model or on parameters are found only when it is applied.
    """
    touched = touches(stem)
    if HELD & set(touched) or stem not in plan.optimizations():
        return None
    others = ", ".join(name for name in plan.optimizations() if savable(name))
    if touched:
        return f"{stem}: changes how a model computes, which no checkpoint holds; these change weights: {others}"
    return (
        f"{stem}: makes no checkpoint by itself, as it changes a server or is applied through others; give one of "
        f"these ({others}), or with --stack the recipe that a search wrote"
    )


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
