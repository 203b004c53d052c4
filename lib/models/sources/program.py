"""Options for running other programs: their output is read as UTF-8 whatever the terminal's encoding, and they get no
input, since nobody would see a question.
"""

import os
import subprocess
from typing import Any


def options() -> dict[str, Any]:
    """Return keyword arguments of `subprocess.run` for a program without input, whose output is captured as text."""
    return {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "encoding": "utf-8",
        "errors": "replace",
        "env": os.environ | {"PYTHONIOENCODING": "utf-8"},
        "check": False,
    }
