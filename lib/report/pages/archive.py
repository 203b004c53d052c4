"""Packs what a reader needs into `report.zip`: every page, the suites' files with their pictures, and the records.

Opens from disk as the folder does; notebooks and logs are left out. Knows no content.
"""

import os
import zipfile
from pathlib import Path

NAME = "report.zip"
ENDINGS = (".html", ".json", ".txt", ".md", ".png")
STORED = (".png",)


def write(folder: Path) -> Path:
    """Write `<folder>/report.zip`, whole or not at all; return its path. Raises OSError.

    The pages of single runs as Markdown, with pictures of their own, say what their HTML says, and are left out.
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
