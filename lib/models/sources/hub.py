"""Checkpoints of the hub, in its own cache: complete ones are used without a network, broken downloads are resumed."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lib.errors import UserError
from lib.models.sources import store

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
UNUSED = ["*/*.safetensors", "consolidated*.safetensors"]  # the same weights once more, in other layouts
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
SHA256, SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")  # one of them, as tokenizer_check expects
ADVICE = "give a folder with --checkpoints, or --random-weights"
PLACES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")


def cache() -> Path | None:
    """Return the folder of the hub's cache, where its client looks too (`huggingface_hub.constants`): by the variables
    that it reads, in its order, with `~` and `$NAME` expanded; None where that begins at a home and there is none.
    """
    read = os.environ.get
    home = read("HF_HOME", os.path.join(read("XDG_CACHE_HOME", os.path.join("~", ".cache")), "huggingface"))
    inside = os.path.join(_expanded(home), "hub")
    folder = _expanded(read("HF_HUB_CACHE", read("HUGGINGFACE_HUB_CACHE", inside)))
    return None if folder.startswith("~") else Path(folder)


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))


def make_places_absolute() -> None:
    """Make what the variables of the hub's client say of places absolute, for the programs that are started: they work
    in other folders, and would look for the cache there.
    """
    for name in PLACES:
        place = _expanded(os.environ.get(name, ""))
        if place and not place.startswith("~") and not os.path.isabs(place):
            os.environ[name] = os.path.abspath(place)


def revision(hub_id: str) -> str | None:
    """Return the commit of a hub id that lies in the cache, None before it was fetched."""
    if (folder := cache()) is None:
        return None
    try:
        reference = folder / f"models--{hub_id.replace('/', '--')}" / "refs" / "main"
        return reference.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def local(hub_id: str) -> Path | None:
    """Return the folder of a hub checkpoint whose files are all in the cache, else None."""
    commit, folder = revision(hub_id), cache()
    if not commit or folder is None:
        return None
    snapshot = folder / f"models--{hub_id.replace('/', '--')}" / "snapshots" / commit
    return snapshot if _whole(snapshot) else None


def _whole(snapshot: Path) -> bool:
    """Return whether configuration, a tokenizer and the weights are there, every file that an index names among them.

    The client writes files as they come: shards may be there before their index, and all weights before the tokenizer.
    """
    if not (snapshot / "config.json").is_file() or not any((snapshot / name).is_file() for name in TOKENIZERS):
        return False
    if not (snapshot / INDEX).is_file():
        names = [path.name for path in snapshot.glob("*.safetensors")]
        return bool(names) and not any(SHARD.search(name) for name in names)
    try:
        files = set(json.loads((snapshot / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        return all((snapshot / str(name)).is_file() for name in files)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return True  # damaged: the check of the folder names what is wrong


def fetch(hub_id: str) -> Path:
    """Return the folder of a hub checkpoint, downloaded where it is not complete: every file that is kept under a hash
    is checked. Raises UserError in one line.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=PATTERNS, ignore_patterns=UNUSED))
    except GatedRepoError:
        reason = "its owner wants terms to be accepted first, by a user who is logged in"
    except RepositoryNotFoundError:
        reason = "the hub has no such model, or not for this user"
    except HFValidationError:
        reason = "not a hub id"
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set"
    except LocalEntryNotFoundError:
        reason = "no network, or the hub does not answer, and it is not in the local cache"
    except Exception as error:  # the hub's client lets pass what its transport raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    else:
        if damaged := next(_damaged(hub_id), None):
            forget(hub_id)
            what = f"the download is damaged ({damaged.name} has another hash)"
            raise UserError(f"{hub_id}: {what}; it was removed, call again")
        return folder
    raise UserError(f"{hub_id}: cannot be fetched from the hub ({reason}); {ADVICE}")


def _named_by_hash(snapshot: Path) -> dict[Path, str]:
    """Return the files of a snapshot that the cache keeps under a hash of their content, each with that hash: large
    ones under their SHA-256, the others under the SHA-1 by which git knows them.
    """
    links = {path: Path(os.readlink(path)).name for path in sorted(snapshot.rglob("*")) if path.is_symlink()}
    return {path: name for path, name in links.items() if SHA256.fullmatch(name) or SHA1.fullmatch(name)}


def _holds(path: Path, expected: str) -> bool:
    """Return whether the content of a file has the hash under which the cache keeps it. Mirrors of the hub name small
    files by the plain SHA-1 of their content.
    """
    if SHA256.fullmatch(expected):
        return store.sha256(path) == expected
    content = path.read_bytes()
    blob = b"blob %d\0" % len(content) + content  # as git hashes a file
    return expected in {hashlib.sha1(data, usedforsecurity=False).hexdigest() for data in (blob, content)}


def checked(hub_id: str) -> str:
    """Return in words which files of a checkpoint `verify` can check."""
    snapshot = local(hub_id)
    files = [path for path in snapshot.rglob("*") if path.is_file()] if snapshot else []
    names = [*_named_by_hash(snapshot).values()] if snapshot else []
    if len(names) == len(files):
        return "every file unchanged"
    kinds = {"SHA-256": SHA256, "SHA-1": SHA1}
    by = [kind for kind, pattern in kinds.items() if any(map(pattern.fullmatch, names))] or ["SHA-256"]
    return f"{len(names)} of {len(files)} files checked by {' and '.join(by)} and unchanged"


def verify(hub_id: str) -> str | None:
    """Return None, or which file of a checkpoint has another hash than the one under which the cache keeps it."""
    path = next(_damaged(hub_id), None)
    return None if path is None else f"{path} has changed since it was fetched"


def _damaged(hub_id: str) -> Iterator[Path]:
    snapshot = local(hub_id)
    named = {} if snapshot is None else _named_by_hash(snapshot)
    for path, expected in named.items():
        if not path.is_file() or not _holds(path, expected):
            yield path


def forget(hub_id: str) -> None:
    """Remove the damaged files of a checkpoint, and the link to its configuration: then it does not count as whole, and
    the hub's client brings what is missing. Raises UserError where they cannot be removed.
    """
    snapshot = local(hub_id)
    try:
        for path in [*_damaged(hub_id)]:
            for file in (path.resolve(), path.parent / os.readlink(path), path):  # the blob may be a link too
                file.unlink(missing_ok=True)
            if snapshot is not None:
                (snapshot / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: is damaged, and cannot be removed ({error.strerror})") from None
