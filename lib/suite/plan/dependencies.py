"""The modules of `lib` that a template depends on: a static walk over the imports of its cells and its own module.

Reads source text; imports and runs nothing. Imports inside functions count too. A notebook or an optimization module
that imports by name at run time (`import_module`, `iter_modules`) depends on all of `lib/optimizations`, because the
modules cannot be determined.
"""

import ast
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from lib.suite.plan.plan import ROOT
from lib.suite.plan.template import Template

OPTIMIZATIONS = ROOT / "lib" / "optimizations"
MAGIC = re.compile(r"^\s*[%!?].*$", re.MULTILINE)
NAME = re.compile(r"lib(\.\w+)+")
QUOTED = re.compile(r"""["'}]lib\.\w""")  # possible start of a string that is a module's name
BY_NAME = re.compile(r"\b(import_module|iter_modules|__import__|spec_from_file_location)\b")


def reached(template: Template) -> list[Path]:
    """Return the files of `lib` that the template's result may depend on, sorted."""
    source = "\n".join(MAGIC.sub("", text) for kind, text, _ in template.cells if kind == "code")
    own = [OPTIMIZATIONS / f"{template.stem}.py", OPTIMIZATIONS / template.stem / "method.py"]
    files_by_name = _modules()
    waiting = [path for name in imported(source, "") for path in _files(name, files_by_name)]
    waiting += [path for path in own if path.is_file()]
    waiting += _every() if BY_NAME.search(source) else []
    files: set[Path] = set()
    followed: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in files:
            continue
        files.add(path)
        names, imports_by_name = _module(path, path.stat().st_mtime_ns)
        waiting += [file for name in names if name not in followed for file in _files(name, files_by_name)]
        followed.update(names)
        waiting += _every() if imports_by_name and path.is_relative_to(OPTIMIZATIONS) else []
    return sorted(files)


def _every() -> list[Path]:
    return sorted(path for path in OPTIMIZATIONS.rglob("*.py") if not path.name.startswith("."))  # `._x.py` of macOS


@cache
def _module(path: Path, _changed: int) -> tuple[tuple[str, ...], bool]:
    """Return the modules that a file imports, and whether it imports others by name."""
    source = path.read_text(encoding="utf-8")
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names = dict.fromkeys(name for name in imported(source, package) if name.partition(".")[0] == "lib")
    return tuple(names), bool(BY_NAME.search(source))


def imported(source: str, package: str) -> Iterator[str]:
    """Yield the dotted names that `source` imports, `from a import b` as `a.b`; nothing if it does not parse.

    A string that is the name of a module counts too: `[sys.executable, "-m", "lib.measure.trackers.memory_child"]`
    runs that module.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
    for text in ast.walk(tree) if QUOTED.search(source) else ():  # most modules have no such string
        if isinstance(text, ast.Constant) and isinstance(text.value, str) and NAME.fullmatch(text.value):
            yield text.value


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield every statement at any depth; expressions cannot contain imports."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            for statement in getattr(node, block, ()):
                waiting.append(statement)
                yield statement


def _modules() -> dict[str, list[Path]]:
    """Return dotted name → its files in `lib`: a package's `__init__.py`, a module."""
    files_by_name: dict[str, list[Path]] = {}
    for folder, _, names in os.walk(ROOT / "lib"):
        package = ".".join(Path(folder).relative_to(ROOT).parts)
        for name in names:
            stem, ending = os.path.splitext(name)
            if ending == ".py":
                module = package if stem == "__init__" else f"{package}.{stem}"
                files_by_name.setdefault(module, []).append(Path(folder, name))
    return files_by_name


def _files(name: str, files_by_name: Mapping[str, Sequence[Path]]) -> Iterator[Path]:
    """Yield the files of `lib` that are executed by importing the dotted name `name`: its packages and the module."""
    parts = name.split(".")
    if parts[0] == "lib":
        for end in range(1, len(parts) + 1):
            yield from files_by_name.get(".".join(parts[:end]), ())
