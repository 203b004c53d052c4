"""The child's side of `children`: a program joins its control group before it allocates memory, opens a model, reads a
prompt, and decodes on request until its input ends. This module loads nothing itself.

Protocol: one line of JSON, then command words; each is answered by a line of JSON. Everything else that the program
prints goes to standard error.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lib.optimizations.streaming_computation.limited import process_memory

GO, RESET = "go", "reset"
SETTLING, STEADY = 5, 2**20  # maximum of calls until settled, and bytes of growth below which a process is settled


class Decoded(NamedTuple):
    """The tokens of one call and the seconds it took."""

    tokens: list[int]
    seconds: float


Decode = Callable[[], Decoded]


def serve(opened: Callable[[Mapping[str, Any]], tuple[Decode, int]]) -> None:
    """Answer requests until the input ends.

    `opened` gets the first request and returns the decode function and the bytes of weights in private memory. An
    exception is answered by {"failed": its message}.
    """
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        request = json.loads(sys.stdin.readline())
        if request["members"]:
            Path(request["members"]).write_text(str(os.getpid()), encoding="utf-8")
        process_memory.keep_freed_memory()
        try:
            decode, private_bytes = opened(request)
            _answer(answers, {"private_bytes": private_bytes})
            for line in sys.stdin:
                _answer(answers, _decoded(decode) if line.strip() == GO else {"reset": process_memory.reset_peak()})
        except Exception as error:
            _answer(answers, {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]})


def settle(decode: Decode) -> None:
    """Decode at least twice, until this process's own memory stops growing, at most `SETTLING` times.

    The limit is derived from its memory at that point.
    """
    private = 0
    for call in range(SETTLING):
        decode()
        before, private = private, process_memory.usage().get("anonymous", 0)
        if call and private - before < STEADY:
            return


def _decoded(decode: Decode) -> dict[str, Any]:
    before = process_memory.disk_bytes()
    tokens, seconds = decode()
    after = process_memory.disk_bytes()
    read = None if before is None or after is None else after - before
    return {"tokens": tokens, "seconds": seconds, "disk_bytes": read, "memory": process_memory.usage()}


def _answer(answers: Any, content: Mapping[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()
