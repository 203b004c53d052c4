"""The user's own files named by a run's parameters: a YAML file with a task of the harness, the files that it names in
turn, a text. A result depends on their content. Independent of what they mean.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lib.models.tasks.harness_names import FILES, HARNESS, Tolerant, listed


def of(parameters: Mapping[str, Any]) -> list[Path]:
    """Return every file that a parameter names by absolute path, and the files that such a YAML file names: by relative
    path, or, if it is a group of tasks, by the tasks' names. Sorted.
    """
    files: set[Path] = set()
    waiting = [path for text in _texts(dict(parameters)) if (path := Path(text)).is_absolute() and _is_file(path)]
    while waiting:
        path = waiting.pop()
        if path in files:
            continue
        files.add(path)
        if path.suffix in FILES:
            content = _yaml(path)
            waiting += [near for text in _texts(content) if _is_file(near := path.parent / text)]
            waiting += _members(content, path.parent) if isinstance(content, dict) and "group" in content else []
    return sorted(files)


def _members(group: dict[str, Any], folder: Path) -> list[Path]:
    """Return the files under `folder` that describe a task or group listed by `group`."""
    wanted = listed(group)
    members: list[Path] = []
    for path in sorted(folder.rglob("*.yaml")) if wanted else ():
        content = _yaml(path)
        names = [content.get(key) for key in ("task", "group")] if isinstance(content, dict) else []
        members += [path] if any(isinstance(name, str) and name in wanted for name in names) else []
    return members


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a string that is not a path
        return False


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in a value, at any depth; for a task of the harness, the part after its prefix."""
    if isinstance(value, str):
        yield value.removeprefix(HARNESS)
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Tolerant)
    except (OSError, ValueError, yaml.YAMLError):
        return None
