"""A user's own text file: read in windows, or refused in one line before anything runs."""

import json
import os
from types import SimpleNamespace

import pytest

from lib.errors import UserError
from lib.models.proxies import tokenizer as tokenizers
from lib.models.tasks import text_file

LINE = "The quick brown fox jumps over the lazy dog, again and again.\n"


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizers.train(2048)


@pytest.fixture
def long(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(LINE * 1500, encoding="utf-8")
    return path


def test_windows_are_disjoint_and_spread_over_the_file(vocabulary, long):
    every = text_file.windows(vocabulary, long, 1000)
    assert every.shape[1] == text_file.WINDOW_TOKENS and len(every) >= text_file.LEAST_WINDOWS
    stream = vocabulary(long.read_text()).input_ids
    assert every.flatten().tolist() == stream[: every.numel()]
    some = text_file.windows(vocabulary, long, 6)
    assert len(some) == 6 and (some[0] == every[0]).all() and (some[-1] == every[-1]).all()
    text_file.check(long)


def test_the_checkpoints_tokenizer_counts_the_tokens(vocabulary, tmp_path):
    vocabulary.save_pretrained(tmp_path)
    short = tmp_path / "short.txt"
    short.write_text(LINE * 210, encoding="utf-8")  # enough bytes, too few tokens
    text_file.check(short)
    with pytest.raises(UserError, match=r"holds at most [\d,]+ tokens; expected at least 12,288: 6 windows of 2,048"):
        text_file.check(short, tmp_path)
    with pytest.raises(UserError, match="expected at least 12,288"):
        text_file.windows(vocabulary, short, 6)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json: cannot be read as a tokenizer"):
        text_file.check(short, tmp_path)


def test_an_earlier_tokenizer_limit_does_not_reduce_the_token_count(vocabulary, long, tmp_path):
    vocabulary.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    padded = {"strategy": {"Fixed": 20_000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padded |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    short = tmp_path / "short.txt"
    short.write_text(LINE, encoding="utf-8")
    for padding in (None, padded):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"padding": padding}))
        text_file.check(long, tmp_path)
        with pytest.raises(UserError, match=r"holds at most [\d]+ tokens"):
            text_file.check(short, tmp_path)


def test_models_with_few_positions_read_shorter_windows(vocabulary, tmp_path):
    vocabulary.save_pretrained(tmp_path)
    short, tiny = tmp_path / "short.txt", tmp_path / "tiny.txt"
    short.write_text(LINE * 210, encoding="utf-8")
    tiny.write_text(LINE * 20, encoding="utf-8")
    for config in ({"max_position_embeddings": 256}, {"text_config": {"max_position_embeddings": 256}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        text_file.check(short, tmp_path)
        with pytest.raises(UserError, match="expected at least 1,536: 6 windows of 256"):
            text_file.check(tiny, tmp_path)
    assert text_file.windows(vocabulary, short, 6, 256).shape == (6, 256)
    with pytest.raises(UserError, match="6 windows of 256"):
        text_file.windows(vocabulary, tiny, 6, 256)


@pytest.mark.parametrize(("characters", "read"), [(1, [20_000]), (2, [20_000, 1500 * len(LINE)])])
def test_the_length_check_does_not_read_a_long_text_whole(tmp_path, monkeypatch, long, characters, read):
    """Each token has `characters` characters."""
    lengths = []

    class Counting:
        @classmethod
        def from_file(cls, _):
            return cls()

        def no_truncation(self):
            pass

        no_padding = no_truncation

        def encode(self, text, add_special_tokens):
            lengths.append(len(text))
            return SimpleNamespace(ids=range(len(text) // characters))

    monkeypatch.setattr("tokenizers.Tokenizer", Counting)
    monkeypatch.setattr(text_file, "ENOUGH_CHARACTERS", 20_000)
    (tmp_path / "tokenizer.json").write_text("{}")
    text_file.check(long, tmp_path)
    assert lengths == read


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"caf\xe9 " * 9000, r"not UTF-8 \(byte 3\)"), (b"", "holds at most 0 tokens"), (None, "cannot be read")],
)
def test_unusable_files_are_refused_in_one_line(tmp_path, content, fault):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as caught:
        text_file.check(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        text_file.check(tmp_path)


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert text_file.read(tmp_path / "a.txt") == "abc"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe: not a regular file; expected a text file"):
        text_file.check(tmp_path / "pipe")
