"""GGUF files: converted once into an ordinary checkpoint folder in the cache, by a process of its own.

The conversion itself is `lib.models.sources.convert`; this module imports no torch.
"""

import subprocess
import sys
from pathlib import Path

from lib.errors import UserError
from lib.models.sources import program, store
from lib.models.sources.store import Tell, silent

CONVERSION = 2  # raised when the same file would be converted into something else
HEADER_BYTES = 24
REPOSITORY = Path(__file__).resolve().parents[3]


def place(file: Path, identity: str | None = None) -> Path:
    """Return where the folder converted from `file` lies. `identity`: what the file is, if not this path at this time.

    Raises UserError where there is no such file.
    """
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; expected a GGUF file") from None
    what = [identity] if identity else [file, stat.st_size, stat.st_mtime_ns]
    return store.entry("gguf", file.stem, CONVERSION, *what)


def convert(file: Path, identity: str | None = None, tell: Tell = silent) -> Path:
    """Return the checkpoint folder of a GGUF file, converted where that has not been done yet.

    Raises UserError for a file that is no GGUF, is truncated, or whose architecture or tokenizer cannot be read.
    """
    folder = place(file, identity)
    with store.alone(folder):
        if store.receipt(folder) is None:
            check(file)
            tell(f"{file.name}: converting into a checkpoint folder, once", 0, None)
            try:
                with store.fresh(folder) as part:
                    _run(file, part)
                    store.sign(part, reference=identity or str(file), conversion=CONVERSION, sha256=store.sha256(file))
            except OSError as error:
                raise store.explained(error, file.name) from None
    return folder


def check(file: Path) -> None:
    """Raise UserError where `file` does not open as a GGUF file does."""
    if not file.is_file():
        raise UserError(f"{file}: no file; expected a GGUF file")
    try:
        with file.open("rb") as opened:
            start = opened.read(HEADER_BYTES)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    if start[:4] != b"GGUF" or len(start) < HEADER_BYTES:
        raise UserError(f"{file}: not a GGUF file (it does not open with GGUF, or is shorter than a header)")


def _run(file: Path, target: Path) -> None:
    called = [sys.executable, "-m", "lib.models.sources.convert", str(file), str(target)]
    ended = subprocess.run(called, cwd=REPOSITORY, **program.options())
    if ended.returncode:
        lines = ended.stdout.strip().splitlines() or ended.stderr.strip().splitlines()
        killed = f"the conversion was ended by the system ({ended.returncode}); is there enough memory?"
        raise UserError(f"{file}: {lines[-1][:300] if lines and ended.returncode > 0 else killed}")
