"""The commands that a page or a message names lead to the results that it is about: `--out DIR` where these do not lie
in the usual folder, `executed` of the project. Knows no command.
"""

import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
USUAL = ROOT / "executed"
SCALES = ("proxy", "slice", "full")


def out_of(folder: Path | None) -> str | None:
    """Return the DIR of `--out DIR` for the results in `folder`, which is DIR/<scale>, as it is seen from the project's
    folder; None where that is the usual one, and where no DIR leads there.
    """
    if folder is None or (where := Path(folder).resolve()).name not in SCALES or where.parent == USUAL:
        return None
    return str(where.parent.relative_to(ROOT) if where.parent.is_relative_to(ROOT) else where.parent)


def leading_to(command: str | None, out: str | None, option: str = "--out") -> str | None:
    """Return a command with the option that names where the results are; as it is where `out` is None or empty."""
    return f"{command} {option} {shlex.quote(out)}" if command and out else command


def at(command: str, folder: Path | None) -> str:
    """Return a command that leads to the results in `folder`."""
    return leading_to(command, out_of(folder)) or command
