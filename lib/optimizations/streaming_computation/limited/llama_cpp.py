"""The streamed model against llama.cpp's mmap: the same GGUF file, prompt, number of tokens and memory limit.

Both decode with a warm page cache, then within the same bytes, then with llama.cpp limited to the same share of its own
file. llama.cpp uses the file's quantized weights, the streamed model dequantized ones; the bytes differ, so there are
no verdicts. If llama.cpp cannot run, a row gives the reason.
"""

import importlib.metadata
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lib.errors import UserError
from lib.measure.metrics import measurement, paired_samples, paired_stats, settings
from lib.measure.metrics.measurement import Measurement
from lib.models.loading import Loaded
from lib.models.sources import fetch
from lib.optimizations.streaming_computation.limited import children, side_by_side
from lib.optimizations.streaming_computation.limited.decoding import LEFT_OUT, require_binding, weights_bytes
from lib.optimizations.streaming_computation.limited.side_by_side import ARMS, TURNS, Condition, Program

PACKAGE = "xllamacpp"  # llama.cpp as a wheel; optional, not in requirements.txt
NAME = "llama.cpp, mmap"
METRIC = "time_per_output_token_ms"
WARM, BYTES, SHARE = "warm page cache", "within the same bytes", "within the same share of its own file"
THREADS = 1


@dataclass(frozen=True)
class LlamaCppRival:
    """Measurements with llama.cpp as the baseline, without verdicts, and `details`: the limits, and the memory, reads
    and bits per weight of each arm.
    """

    measurements: list[Measurement]
    details: dict[str, Any]


def compare(
    loaded: Loaded, folder: Path, prompt_1T: torch.Tensor, steps: int, memory_ratio: float, options: Mapping[str, Any]
) -> LlamaCppRival:
    """Return decoding `steps` tokens by the model streamed from `folder`, against llama.cpp on its GGUF file.

    `options` are those of `method.open_folder` without the memory. One unavailable row, with the reason, if the model
    does not come from a GGUF file, the package is missing, or a process does not start.
    """
    try:
        file, about = original(loaded), f"llama.cpp ({PACKAGE} {required(PACKAGE)}), weights mapped"
    except UserError as error:
        return unavailable(str(error))
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    return beside(file, folder, prompt_1T, steps, memory_ratio, options, count, about)


def original(loaded: Loaded) -> Path:
    """Return the GGUF file that the weights of a model were converted from. Raises UserError if there is none."""
    if not settings.wants("performance"):
        raise UserError(settings.why_left_out())
    if torch.device(loaded.device).type != "cpu":
        raise UserError("weights on a device are not held by page cache")
    if loaded.random_weights or loaded.scale != "full":
        raise UserError(f"the weights of scale {loaded.scale} come from no GGUF file")
    source = loaded.parameters.source
    file = fetch.gguf(source)
    if file is None or fetch.local(source) != loaded.folder:
        raise UserError("the weights come from no GGUF file")
    return file


def required(package: str) -> str:
    """Return the version of an optional package. Raises UserError with the command to install it if it is missing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"llama.cpp is not installed here: pip install {package}")
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def unavailable(reason: str) -> LlamaCppRival:
    """Return a single row with the reason why llama.cpp did not run."""
    row = measurement.unavailable(METRIC, f"decode, against {NAME}", reason)
    return LlamaCppRival([row], {"reason": reason})


def beside(
    file: Path,
    folder: Path,
    prompt_1T: torch.Tensor,
    steps: int,
    memory_ratio: float,
    options: Mapping[str, Any],
    parameters: int,
    about: str = "llama.cpp",
    *,
    command: Sequence[str] = (),
    turns: int = TURNS,
) -> LlamaCppRival:
    """Return the result of `compare` for the GGUF `file` of a model with its checkpoint in `folder`.

    `parameters` is the model's parameter count. `command` starts another program instead of llama.cpp.
    """
    own, total = file.stat().st_size, weights_bytes(folder)
    allowed = round(memory_ratio * total)
    shared = round(memory_ratio * own)
    conditions = [
        Condition(WARM),
        Condition(BYTES, {"baseline": allowed, "optimized": allowed}, _would_not_bind(total, allowed)),
        Condition(SHARE, {"baseline": shared, "optimized": allowed}, _would_not_bind(own, shared)),
    ]
    streaming = {name: value for name, value in options.items() if name not in LEFT_OUT}
    programs = {
        "baseline": Program(command or children.module("llama_cpp_child"), file),
        "optimized": Program(children.module("child"), folder, streaming | {"memory_ratio": memory_ratio}),
    }
    request = {"prompt": prompt_1T.cpu().tolist(), "steps": steps, "threads": THREADS}
    try:
        side_by_side.measure(programs, request, conditions, turns=turns)
    except UserError as error:
        return unavailable(str(error))
    bits = {"baseline": 8 * own / parameters, "optimized": 8 * total / parameters}
    rows = [row for condition in conditions for row in _rows(condition, steps, bits)]
    details = {"file_bytes": own, "weights_bytes": total, "threads": THREADS, "llama_cpp": about, "rows": rows}
    details |= {"allowance_bytes": {condition.name: dict(condition.allowed) for condition in conditions[1:]}}
    details |= {"same_tokens": _same_tokens(conditions[0])}
    measurements = [m for condition in conditions for m in _measurements(condition, steps, bits, about)]
    return LlamaCppRival(measurements, details)


def _would_not_bind(total: int, allowed: int) -> str | None:
    """Return why a limit of `allowed` out of `total` bytes would not bind, or None if it would."""
    try:
        require_binding(total, allowed)
    except UserError as error:
        return str(error)
    return None


def _measurements(condition: Condition, steps: int, bits: Mapping[str, float], about: str) -> list[Measurement]:
    """Return the time per token and memory peak under one limit, without verdicts; one unavailable row if not measured.

    Their note gives the bits per weight of both arms: the same bytes may hold all of llama.cpp's file.
    """
    workload = f"decode, against {NAME}, {condition.name}"
    if condition.reason is not None:
        return [measurement.unavailable(METRIC, workload, condition.reason)]
    note = (
        f"not judged: llama.cpp computes with the file's quantized weights, {bits['baseline']:.1f} bits each, the "
        f"streamed model with dequantized ones, {bits['optimized']:.1f} bits each"
    )
    timed = paired_samples.from_pairs(METRIC, workload, condition.pairs(), steps, None)
    rows = [timed.model_copy(update={"source": f"{about}, {THREADS} thread; {timed.source}"})]
    theirs, ours = (condition.held(arm, "peak") for arm in ARMS)
    if theirs and ours:
        source = f"{about}; VmHWM of the whole process, reset under this limit, {len(ours)} fresh processes per arm"
        settled: dict[str, Any] = {"source": source, "floor": None, "process": range(len(ours))}
        rows.append(paired_samples.from_samples("peak_memory_bytes", workload, theirs, ours, **settled))
    return [measurement.unjudged(row, note) for row in rows]


def _rows(condition: Condition, steps: int, bits: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a row per arm: milliseconds per token with interval, and the memory and disk reads of its processes."""
    rows = []
    for arm, name in zip(ARMS if condition.reason is None else (), (NAME, "streamed")):
        ends = [1000 * end / steps for end in paired_stats.median_interval(condition.seconds[arm])]
        row = {"limit": condition.name, "arm": name, "ms_per_token": 1000 * median(condition.seconds[arm]) / steps}
        row |= {name: end if math.isfinite(end) else None for name, end in zip(("low", "high"), ends)}
        row["bits_per_weight"] = bits[arm]
        for kind in ("peak", "file", "anonymous"):
            row[f"{kind}_bytes"] = median(held) if (held := condition.held(arm, kind)) else None
        read = [answer["disk_bytes"] for answer in condition.answers[arm]]
        row["disk_bytes_per_token"] = None if None in read else median(read) / steps
        rows.append(row)
    return rows


def _same_tokens(condition: Condition) -> dict[str, int] | None:
    """Return the number of equal tokens in both arms, and of tokens compared; quantized weights may choose others.

    llama.cpp's first token comes from the prompt; the streamed model's tokens start after that one.
    """
    if condition.reason is not None:
        return None
    theirs, ours = (condition.answers[arm][-1]["tokens"] for arm in ARMS)
    compared = list(zip(theirs[1:], ours))
    return {"equal": sum(expected == token for expected, token in compared), "compared": len(compared)}
