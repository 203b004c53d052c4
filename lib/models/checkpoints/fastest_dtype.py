"""Chooses the faster dtype for a model of real size on this machine: measured once per machine and matrix size, cached.

bfloat16 halves the bytes read per new token. On a processor without bfloat16 instructions, its products are emulated
and can lose more than the halving gains. So the products of a new token and of a prompt are timed in both dtypes.
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
GAIN = 1.25  # mean speed-up over a new token and a prompt that float32 needs, since it takes twice the memory


def fastest(config: dict[str, Any]) -> str:
    """Return "bfloat16" or "float32", whichever suits inference on this processor with matrices of `config`'s size.

    Measured at the first call on a machine and cached for good, so that arms, and processes that load the same model,
    use the same dtype.
    """
    hidden, width = _size(config)
    key, known = _key(hidden, width), _known()
    if key not in known:
        known[key] = {
            f"{name} {rows}": _product(hidden, width, rows, getattr(torch, name))
            for name in (PREFERRED, OTHER)
            for rows in ROWS.values()
        }
        with suppress(OSError):  # without a writable cache, the next process measures again
            files.write_atomically(_path(), json.dumps(known, indent=1))
    return _choice(known[key])


def _choice(seconds: dict[str, float]) -> str:
    gains = [seconds[f"{PREFERRED} {rows}"] / seconds[f"{OTHER} {rows}"] for rows in ROWS.values()]
    return OTHER if math.prod(gains) ** (1 / len(gains)) > GAIN else PREFERRED


def reason(config: dict[str, Any], used: str = "") -> str | None:
    """Return the measurement behind `fastest` as a sentence, or None if it was not measured.

    If the weights are in the slower dtype `used`, the sentence says why.
    """
    hidden, width = _size(config)
    if (seconds := _known().get(_key(hidden, width))) is None:
        return None
    times = {name: [1e6 * seconds[f"{name} {rows}"] for rows in ROWS.values()] for name in (PREFERRED, OTHER)}
    parts = [
        f"{preferred:.0f} µs in {PREFERRED} and {other:.0f} µs in {OTHER} for {phase}"
        for phase, preferred, other in zip(ROWS, *times.values())
    ]
    memory = f"{OTHER} would not fit into memory" if used == PREFERRED and _choice(seconds) == OTHER else ""
    memory = memory or f"{OTHER} needs twice the memory"
    return f"a product of {hidden} × {width} takes {'; '.join(parts)}; {memory}"


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
    """Return the shortest time in seconds of a product of `rows` vectors with a matrix [width, hidden]."""
    weight, tokens = torch.randn(width, hidden).to(dtype), torch.randn(rows, hidden).to(dtype)
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        linear(tokens, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
