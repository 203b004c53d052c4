"""Adds `--out DIR` to a command shown on a page or in a message when the results it refers to are not in the default
folder, the project's `executed`. Works for any command.
"""

import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
USUAL = ROOT / "executed"
SCALES = ("proxy", "slice", "full")


def out_of(folder: Path | None) -> str | None:
    """Return the DIR of `--out DIR` for the results in `folder` (DIR/<scale>), relative to the project's folder if it
    lies inside; None where DIR is the default, or `folder` is not named after a scale.
    """
    if folder is None or (where := Path(folder).resolve()).name not in SCALES or where.parent == USUAL:
        return None
    return str(where.parent.relative_to(ROOT) if where.parent.is_relative_to(ROOT) else where.parent)


def leading_to(command: str | None, out: str | None, option: str = "--out") -> str | None:
    """Return `command` with `option` set to the folder `out`; unchanged where `out` is None or empty."""
    return f"{command} {option} {shlex.quote(out)}" if command and out else command


def at(command: str, folder: Path | None) -> str:
    """Return `command` with the options that make it use the results in `folder`."""
    return leading_to(command, out_of(folder)) or command
