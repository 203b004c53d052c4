"""Which tasks of lm-evaluation-harness there are, read from its files: importing it takes seconds, and loads torch.

Knows nothing of what a task asks.
"""

import functools
import importlib.util
import re
from pathlib import Path

from lib.errors import UserError, suggest
from lib.files import expanded

HARNESS = "lm_eval:"  # before the name of a task or a group of the harness, or of a file that describes one
INSTALL = 'pip install "lm-eval>=0.4.13,<0.5"'
FILES = (".yaml", ".yml")
NAME = re.compile(
    r"^(?:task|group|tag):[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*$|^[ \t]*-[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*$", re.M
)


def check(task: str) -> str:
    """Return `task` (with HARNESS before it), a file's path absolute. Raises UserError where there is no such file, the
    harness is not installed, or has no task of this name.
    """
    name = task.removeprefix(HARNESS)
    if name.endswith(FILES):
        path = expanded(name)
        if not path.is_file():
            raise UserError(f"{task}: there is no such file")
        return f"{HARNESS}{path}"
    known = names()
    if known is None:
        raise UserError(f"{task}: lm-evaluation-harness is not installed; {INSTALL}")
    if name not in known:
        raise UserError(f'{task}: lm-evaluation-harness has no task "{name}".{suggest(name, known)}')
    return task


@functools.cache
def names() -> frozenset[str] | None:
    """Return the names of all tasks, groups and tags of the installed harness, None where there is none."""
    try:
        spec = importlib.util.find_spec("lm_eval")
    except ValueError:  # blocked, as tests do
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    known: set[str] = set()
    for path in Path(next(iter(spec.submodule_search_locations)), "tasks").rglob("*.yaml"):
        known.update(
            first or second for first, second in NAME.findall(path.read_text(encoding="utf-8", errors="replace"))
        )
    return frozenset(known)
