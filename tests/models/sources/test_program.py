"""Programs run to completion: output is read in any terminal encoding, and no answer is awaited."""

import subprocess
import sys

import pytest

from lib.models.checkpoints import validate
from lib.models.sources import gguf_file, program, wheel


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_output_is_read_and_prompts_get_no_answer(encoding, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    ended = subprocess.run([sys.executable, "-c", "print('größe 日本'); input('yes?')"], **program.options())
    assert ended.stdout.startswith("größe 日本") and ended.returncode == 1 and "EOFError" in ended.stderr


def test_every_planning_program_is_run_this_way(tmp_path, monkeypatch):
    seen = []

    def run(called, **options):
        seen.append({name: options[name] for name in ("stdin", "encoding", "errors")})
        return subprocess.CompletedProcess(called, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    validate.check([tmp_path])
    gguf_file._run(tmp_path / "a.gguf", tmp_path / "folder")
    wheel._pip("index")
    assert seen == [{"stdin": subprocess.DEVNULL, "encoding": "utf-8", "errors": "replace"}] * 3
