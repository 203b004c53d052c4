"""Splits a file into pieces that are small enough to transfer one by one, and joins them again, verified by hash.
Standard library only.
"""

import hashlib
import json
import zipfile
from pathlib import Path

from lib.errors import UserError

PIECE_BYTES = 60 * 2**20


def split(file: Path, folder: Path, piece_bytes: int = PIECE_BYTES) -> list[Path]:
    """Write `file` into `folder` as NAME.000, NAME.001 … of at most `piece_bytes`, plus NAME.json; return the pieces.
    Each can be transferred separately: NAME.json holds the hash of every piece.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole, pieces, hashes = hashlib.sha256(), [], []
    with file.open("rb") as source:
        while data := source.read(piece_bytes):
            piece = folder / f"{file.name}.{len(pieces):03d}"
            piece.write_bytes(data)
            whole.update(data)
            hashes.append(hashlib.sha256(data).hexdigest())
            pieces.append(piece)
    about = {"name": file.name, "bytes": file.stat().st_size, "sha256": whole.hexdigest(), "pieces": hashes}
    (folder / f"{file.name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return pieces


def join(folder: Path, target: Path) -> Path:
    """Join the one file whose pieces lie in `folder` into the folder `target`; return it.

    Raises UserError that names a missing or damaged piece; no partial file is left.
    """
    descriptions = sorted(folder.glob("*.json"))
    if len(descriptions) != 1:
        raise UserError(f"{folder}: expected the pieces of one file with its NAME.json, found {len(descriptions)}")
    about = json.loads(descriptions[0].read_text(encoding="utf-8"))
    target.mkdir(parents=True, exist_ok=True)
    joined, part = target / about["name"], target / f".{about['name']}.part"
    whole = hashlib.sha256()
    try:
        with part.open("wb") as out:
            for at, expected in enumerate(about["pieces"]):
                piece = folder / f"{about['name']}.{at:03d}"
                if not piece.is_file():
                    raise UserError(f"{piece}: missing; {len(about['pieces'])} pieces are expected")
                data = piece.read_bytes()
                if hashlib.sha256(data).hexdigest() != expected:
                    raise UserError(f"{piece}: damaged: its hash differs; copy it again")
                whole.update(data)
                out.write(data)
        if whole.hexdigest() != about["sha256"]:
            raise UserError(f"{joined}: the joined file's hash differs; split it again")
        part.replace(joined)
    finally:
        part.unlink(missing_ok=True)
    return joined


def unpack(archive: Path, target: Path) -> Path:
    """Unpack a .zip of a checkpoint folder (the files, or one folder of them) into `target`; remove the archive; return
    `target`. Raises UserError for any other kind of file.
    """
    if not zipfile.is_zipfile(archive):
        raise UserError(f"{archive.name}: expected a .zip of a checkpoint folder")
    with zipfile.ZipFile(archive) as opened:
        for name in opened.namelist():
            if not name.endswith("/"):
                target.mkdir(parents=True, exist_ok=True)
                (target / Path(name).name).write_bytes(opened.read(name))
    archive.unlink()
    return target
