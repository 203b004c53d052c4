"""Packs everything that a reader needs into `report.zip`: pages, the suites' files with their pictures, and records.

The unpacked folder opens from disk like the original; notebooks and logs are left out. Independent of the content.
"""

import os
import zipfile
from pathlib import Path

NAME = "report.zip"
ENDINGS = (".html", ".json", ".txt", ".md", ".png")
STORED = (".png",)


def write(folder: Path) -> Path:
    """Write `<folder>/report.zip` atomically; return its path. Raises OSError.

    The Markdown pages of single runs, with their pictures, repeat the HTML pages and are left out.
    """
    folder = Path(folder)
    part = folder / f".{NAME}.{os.getpid()}.part"
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=5) as packed:
            for path in sorted(folder.rglob("*")):
                name = path.relative_to(folder)
                if path.suffix in ENDINGS and path.is_file() and _wanted(name):
                    kind = zipfile.ZIP_STORED if path.suffix in STORED else zipfile.ZIP_DEFLATED
                    packed.write(path, f"report/{name.as_posix()}", kind)
        os.replace(part, folder / NAME)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return folder / NAME


def _wanted(name: Path) -> bool:
    if any(piece.startswith(".") for piece in name.parts) or name.parts[0] in ("logs", "failed"):
        return False
    of_a_run = "--" in name.parts[0]
    return not of_a_run or name.suffix in (".html", ".json")
