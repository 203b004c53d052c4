"""Checkpoints of the hub in its own cache: complete ones are used without a network, broken downloads are resumed."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lib.errors import UserError
from lib.models.sources import store

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
UNUSED = ["*/*.safetensors", "consolidated*.safetensors"]  # the same weights again in other layouts
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
SHA256, SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")  # one of these, as in tokenizer_check
ADVICE = "give a folder with --checkpoints, or --random-weights"
PLACES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")


def cache() -> Path | None:
    """Return the folder of the hub's cache, determined as in `huggingface_hub.constants`: from the same environment
    variables in the same order, with `~` and `$NAME` expanded. None if it lies in a home directory that does not exist.
    """
    variable = os.environ.get
    home = variable("HF_HOME", os.path.join(variable("XDG_CACHE_HOME", os.path.join("~", ".cache")), "huggingface"))
    inside = os.path.join(_expanded(home), "hub")
    folder = _expanded(variable("HF_HUB_CACHE", variable("HUGGINGFACE_HUB_CACHE", inside)))
    return None if folder.startswith("~") else Path(folder)


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))


def make_places_absolute() -> None:
    """Make the paths in the environment variables of the hub's client absolute, for child processes, which run in other
    folders and would look for the cache there.
    """
    for name in PLACES:
        place = _expanded(os.environ.get(name, ""))
        if place and not place.startswith("~") and not os.path.isabs(place):
            os.environ[name] = os.path.abspath(place)


def revision(hub_id: str) -> str | None:
    """Return the commit of a hub id in the cache, or None if it has not been fetched."""
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
    """Return whether a snapshot has its configuration, a tokenizer and all weights, including every file of an index.

    The client writes files as they arrive: shards may exist before their index, and all weights before the tokenizer.
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
        return True  # a damaged index, which the check of the folder reports


def fetch(hub_id: str) -> Path:
    """Return the folder of a hub checkpoint, downloaded if it is incomplete; every file kept under a hash is checked.

    Raises UserError if it cannot be fetched or is damaged.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    begun = local(hub_id) is None
    try:
        try:
            folder = Path(snapshot_download(hub_id, allow_patterns=PATTERNS, ignore_patterns=UNUSED))
        except BaseException:  # an interrupt too
            if begun:
                _leave_incomplete(hub_id)
            raise
    except GatedRepoError:
        reason = "it is gated: log in and accept its terms first"
    except RepositoryNotFoundError:
        reason = "the hub has no such model, or not for this user"
    except HFValidationError:
        reason = "not a hub id"
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set"
    except LocalEntryNotFoundError:
        reason = "no network, or the hub does not answer, and it is not in the local cache"
    except Exception as error:  # the hub's client does not wrap the exceptions of its transport
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    else:
        if damaged := next(_damaged(hub_id), None):
            forget(hub_id)
            reason = f"the download is damaged ({damaged.name} has another hash)"
            raise UserError(f"{hub_id}: {reason}; it was removed, call again")
        return folder
    raise UserError(f"{hub_id}: cannot be fetched from the hub ({reason}); {ADVICE}")


def _leave_incomplete(hub_id: str) -> None:
    """Remove the configuration of a checkpoint whose download failed: optional files, such as the chat template, may be
    missing although all weights have arrived.
    """
    if (snapshot := local(hub_id)) is not None:
        with contextlib.suppress(OSError):
            (snapshot / "config.json").unlink()


def _named_by_hash(snapshot: Path) -> dict[Path, str]:
    """Return the files of a snapshot that the cache keeps under a hash of their content, with the hash: the SHA-256 of
    large files, git's SHA-1 of the others.
    """
    links = {path: Path(os.readlink(path)).name for path in sorted(snapshot.rglob("*")) if path.is_symlink()}
    return {path: name for path, name in links.items() if SHA256.fullmatch(name) or SHA1.fullmatch(name)}


def _holds(path: Path, expected: str) -> bool:
    """Return whether the content of a file has the hash `expected`. Mirrors of the hub name small files by the plain
    SHA-1 of their content.
    """
    if SHA256.fullmatch(expected):
        return store.sha256(path) == expected
    content = path.read_bytes()
    blob = b"blob %d\0" % len(content) + content  # as git hashes a file
    return expected in {hashlib.sha1(data, usedforsecurity=False).hexdigest() for data in (blob, content)}


def checked(hub_id: str) -> str:
    """Return a phrase on how many files of a checkpoint `verify` can check."""
    snapshot = local(hub_id)
    files = [path for path in snapshot.rglob("*") if path.is_file()] if snapshot else []
    names = [*_named_by_hash(snapshot).values()] if snapshot else []
    if len(names) == len(files):
        return "every file unchanged"
    kinds = {"SHA-256": SHA256, "SHA-1": SHA1}
    by = [kind for kind, pattern in kinds.items() if any(map(pattern.fullmatch, names))] or ["SHA-256"]
    return f"{len(names)} of {len(files)} files checked by {' and '.join(by)} and unchanged"


def verify(hub_id: str) -> str | None:
    """Return None, or a message on a file of a checkpoint whose content no longer has the hash in its name."""
    path = next(_damaged(hub_id), None)
    return None if path is None else f"{path} has changed since it was fetched"


def _damaged(hub_id: str) -> Iterator[Path]:
    snapshot = local(hub_id)
    named = {} if snapshot is None else _named_by_hash(snapshot)
    for path, expected in named.items():
        if not path.is_file() or not _holds(path, expected):
            yield path


def forget(hub_id: str) -> None:
    """Remove the damaged files of a checkpoint and the link to its configuration, so that it counts as incomplete and
    the hub's client downloads what is missing. Raises UserError if files cannot be removed.
    """
    snapshot = local(hub_id)
    try:
        for path in [*_damaged(hub_id)]:
            for file in (path.resolve(), path.parent / os.readlink(path), path):  # the blob may be a link too
                file.unlink(missing_ok=True)
            if snapshot is not None:
                (snapshot / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: damaged, and cannot be removed ({error.strerror})") from None
