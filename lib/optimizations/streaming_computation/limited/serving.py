"""The other side of `children`: a program joins its control group before it holds anything, opens a model, reads a
prompt, and then decodes on request, until its input ends. Loads nothing itself.

Reads one line of JSON, then words; answers each with a line of JSON. Whatever else the program prints goes to the
error output.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lib.optimizations.streaming_computation.limited import process_memory

GO, RESET = "go", "reset"
SETTLING, STEADY = 5, 2**20  # calls, and the bytes by which a process that has settled still grows


class Decoded(NamedTuple):
    """The tokens of one call, and the seconds that they took."""

    tokens: list[int]
    seconds: float


Decode = Callable[[], Decoded]


def serve(opened: Callable[[Mapping[str, Any]], tuple[Decode, int]]) -> None:
    """Answer requests. `opened` gets the first and returns what decodes, and the bytes of weights in private memory.

    An exception is answered by {"failed": its message}.
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
    """Decode twice, and again until this process holds no more memory of its own than before, at most `SETTLING` times:
    a limit is set by what it holds then.
    """
    held = 0
    for call in range(SETTLING):
        decode()
        before, held = held, process_memory.usage().get("anonymous", 0)
        if call and held - before < STEADY:
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
