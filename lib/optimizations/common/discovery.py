"""List and import the optimizations: the folder is the registry.

An optimization is `lib/optimizations/<stem>.py`, or a folder `<stem>/` with a `method.py`.
"""

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType

import lib.optimizations


def stems() -> list[str]:
    """Return the stems of all optimizations, sorted."""
    modules = pkgutil.iter_modules(lib.optimizations.__path__)
    return sorted(info.name for info in modules if not info.ispkg or (_folder() / info.name / "method.py").is_file())


def method(stem: str) -> ModuleType:
    """Return the main module of an optimization: it defines `applies_to`, and `apply` if it changes the model."""
    return importlib.import_module(f"lib.optimizations.{stem}{'.method' if _is_folder(stem) else ''}")


def beside_method(stem: str, name: str) -> ModuleType | None:
    """Return the module `name` (such as `experiment`) of an optimization's folder, or None if there is no such module
    or no folder.
    """
    full_name = f"lib.optimizations.{stem}.{name}"
    if not _is_folder(stem) or importlib.util.find_spec(full_name) is None:
        return None
    return importlib.import_module(full_name)


def source(stem: str) -> str:
    """Return the path of an optimization's main module, relative to the project root, for messages."""
    return f"lib/optimizations/{stem}{'/method' if _is_folder(stem) else ''}.py"


def _folder() -> Path:
    return Path(lib.optimizations.__path__[0])


def _is_folder(stem: str) -> bool:
    return (_folder() / stem / "method.py").is_file()
