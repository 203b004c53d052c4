"""Which dtype a model at real size runs in on this machine: measured once per machine and size of matrix, and kept.

bfloat16 halves what a new token reads. On a processor without instructions for it, its products are emulated and can be
slower than float32 by more than that halving gains. So the products of a new token and of a prompt are timed in both.
"""

import json
import math
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from lib import files

PREFERRED, OTHER = "bfloat16", "float32"
ROWS = {"a new token": 1, "a prompt": 256}
REPEATS = 7
GAIN = 1.25  # by which float32 must win, over a new token and a prompt together: it needs twice the memory


def fastest(config: dict[str, Any]) -> str:
    """Return "bfloat16" or "float32" for inference on this processor with matrices of this configuration's size.

    Measured at the first call on a machine; afterwards the same answer for ever, so that arms, and processes that load
    the same model, agree.
    """
    hidden, width = _size(config)
    key, known = _key(hidden, width), _known()
    if key not in known:
        known[key] = {
            f"{name} {rows}": _product(hidden, width, rows, getattr(torch, name))
            for name in (PREFERRED, OTHER)
            for rows in ROWS.values()
        }
        with suppress(OSError):  # a cache that cannot be written is no error
            files.write_atomically(_path(), json.dumps(known, indent=1))
    return _choice(known[key])


def _choice(seconds: dict[str, float]) -> str:
    gains = [seconds[f"{PREFERRED} {rows}"] / seconds[f"{OTHER} {rows}"] for rows in ROWS.values()]
    return OTHER if math.prod(gains) ** (1 / len(gains)) > GAIN else PREFERRED


def reason(config: dict[str, Any], used: str = "") -> str | None:
    """Return the measurement that `fastest` decided by, in words, and why the weights are in the dtype `used` all the
    same where that is slower; None where it was not asked.
    """
    hidden, width = _size(config)
    if (seconds := _known().get(_key(hidden, width))) is None:
        return None
    times = {name: [1e6 * seconds[f"{name} {rows}"] for rows in ROWS.values()] for name in (PREFERRED, OTHER)}
    parts = [f"for {what} {ours:.0f} µs, in {OTHER} {other:.0f} µs" for what, ours, other in zip(ROWS, *times.values())]
    room = f"{OTHER} would not fit into memory" if used == PREFERRED and _choice(seconds) == OTHER else ""
    room = room or f"{OTHER} needs twice the memory"
    return f"a product of {hidden} × {width} takes in {PREFERRED} {'; '.join(parts)}; {room}"


def _size(config: dict[str, Any]) -> tuple[int, int]:
    config = config.get("text_config") or config
    hidden = int(config.get("hidden_size") or 1024)
    return hidden, int(config.get("intermediate_size") or 4 * hidden)


def _path() -> Path:
    return files.cache_folder() / "dtypes.json"


def _key(hidden: int, width: int) -> str:
    return f"{platform.node()} {hidden} × {width}, {torch.get_num_threads()} threads"


def _known() -> dict[str, dict[str, float]]:
    with suppress(OSError, ValueError):
        return json.loads(_path().read_text(encoding="utf-8"))
    return {}


@torch.inference_mode()
def _product(hidden: int, width: int, rows: int, dtype: torch.dtype) -> float:
    """Return the least seconds of `rows` vectors times a matrix [width, hidden]."""
    weight, tokens = torch.randn(width, hidden).to(dtype), torch.randn(rows, hidden).to(dtype)
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        linear(tokens, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
