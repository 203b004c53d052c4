"""How other programs are run to their end: what they say is read whatever the terminal's encoding, and they may ask
nothing, since nobody would see the question.
"""

import os
import subprocess
from typing import Any


def options() -> dict[str, Any]:
    """Return keyword arguments of `subprocess.run` for such a program; its output is text."""
    return {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "encoding": "utf-8",
        "errors": "replace",
        "env": os.environ | {"PYTHONIOENCODING": "utf-8"},
        "check": False,
    }
