"""GGUF files: converted once into an ordinary checkpoint folder in the cache, by a separate process.

The conversion itself is `lib.models.sources.convert`; this module imports no torch.
"""

import subprocess
import sys
from pathlib import Path

from lib.errors import UserError
from lib.models.sources import program, store
from lib.models.sources.store import Tell, silent

CONVERSION = 2  # version of the conversion, raised when its result for the same file changes
HEADER_BYTES = 24
REPOSITORY = Path(__file__).resolve().parents[3]


def place(file: Path, identity: str | None = None) -> Path:
    """Return the cache folder for the conversion of `file`. `identity` identifies the file; default: path, size, time.

    Raises UserError if the file does not exist.
    """
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; expected a GGUF file") from None
    identifying = [identity] if identity else [file, stat.st_size, stat.st_mtime_ns]
    return store.entry("gguf", file.stem, CONVERSION, *identifying)


def convert(file: Path, identity: str | None = None, tell: Tell = silent) -> Path:
    """Return the checkpoint folder of a GGUF file, converted if necessary.

    Raises UserError for a file that is not GGUF or is truncated, and if its architecture or tokenizer cannot be read.
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
    """Raise UserError if `file` does not begin like a GGUF file."""
    if not file.is_file():
        raise UserError(f"{file}: no file; expected a GGUF file")
    try:
        with file.open("rb") as opened:
            start = opened.read(HEADER_BYTES)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    if start[:4] != b"GGUF" or len(start) < HEADER_BYTES:
        raise UserError(f"{file}: not a GGUF file (it does not begin with GGUF, or is shorter than a header)")


def _run(file: Path, target: Path) -> None:
    command = [sys.executable, "-m", "lib.models.sources.convert", str(file), str(target)]
    result = subprocess.run(command, cwd=REPOSITORY, **program.options())
    if result.returncode:
        lines = result.stdout.strip().splitlines() or result.stderr.strip().splitlines()
        killed = f"the system ended the conversion ({result.returncode}); is there enough memory?"
        raise UserError(f"{file}: {lines[-1][:300] if lines and result.returncode > 0 else killed}")
