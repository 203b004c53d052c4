"""The names of the tasks of lm-evaluation-harness, read from its files: importing it takes seconds and loads torch.

Knows nothing of what a task asks.
"""

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import yaml

from lib.errors import UserError, suggest
from lib.files import expanded

HARNESS = "lm_eval:"  # prefix for a task or group of the harness, or for a file that describes one
INSTALL = 'pip install "lm-eval>=0.4.13,<0.5"'
FILES = (".yaml", ".yml")
DESCRIBES = ("task", "group", "class", "include")  # the file of a task has at least one of these keys
NAME = re.compile(
    r"^(?:task|group|tag):[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*$|^[ \t]*-[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*$", re.M
)


class Tolerant(yaml.SafeLoader):
    """A loader that reads custom YAML tags as None, and `!function` as the file of the function's module."""


def _file_of_function(loader: yaml.SafeLoader, node: yaml.Node) -> str | None:
    """Return "utils.py" for `!function utils.name`; the harness looks for it in the folder of the task."""
    module, dot, _ = str(node.value).rpartition(".")
    return f"{module.replace('.', '/')}.py" if dot else None


Tolerant.add_multi_constructor("!", lambda loader, suffix, node: None)
Tolerant.add_constructor("!function", _file_of_function)


def check(task: str) -> str:
    """Return `task` (which begins with HARNESS), with the path of a file made absolute.

    Raises UserError if the file is missing or describes no task, if the harness is not installed, or if it has no task
    of this name.
    """
    name = task.removeprefix(HARNESS)
    if name.endswith(FILES):
        path = expanded(name)
        described(path, task)
        return f"{HARNESS}{path}"
    known = names()
    if known is None:
        raise UserError(f"{task}: lm-evaluation-harness is not installed; {INSTALL}")
    if name not in known:
        raise UserError(f'{task}: lm-evaluation-harness has no task "{name}".{suggest(name, known)}')
    return task


def described(path: Path, task: str) -> dict[str, Any]:
    """Return the description of a harness task or group in a file, with functions replaced by the files that hold them.

    Raises UserError, beginning with `task`, if the file is missing or describes no task.
    """
    if not path.is_file():
        raise UserError(f"{task}: there is no such file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Tolerant)
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(getattr(error, "problem", None) or error).split())[:120]
        raise UserError(f"{task}: not readable as YAML ({why})") from None
    if not isinstance(content, dict) or not {*DESCRIBES} & {*content}:
        raise UserError(f'{task}: describes no task of lm-evaluation-harness; expected the key "task" or "group"')
    return content


def listed(described: dict[str, Any]) -> set[str]:
    """Return the names of the tasks and groups in the description of a group."""
    items = described.get("task")
    listed_items = items if isinstance(items, list) else []
    members = (item.get("task", item.get("group")) if isinstance(item, dict) else item for item in listed_items)
    return {name for name in members if isinstance(name, str)}


@functools.cache
def names() -> frozenset[str] | None:
    """Return the names of all tasks, groups and tags of the installed harness, or None if it is not installed."""
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
