"""Real sizes on one GPU in a quarter of an hour: one command runs the most valuable measurements until its time is
over.

    python -m tests.device.full_size --seconds 570 --out OUT [--wheels DIR]

The CUDA tests first, then the optimizations on models of real size with random weights, in the order of
`tests.device.schedule`. It stops by itself after the given number of seconds; finished steps are kept. Beforehand,
elsewhere:

    python -m tests.device.full_size present > PRESENT        (on such a machine: what is installed there)
    python -m tests.device.full_size wheels DIR --present PRESENT
    python -m tests.device.full_size split FILE DIR

`rehearse` runs the whole programme here, on the CPU, with tiny models, by a clock that is SLOWER so many times. Needs
only the standard library until the packages are there. None of the device's settings is changed.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lib.errors import UserError, suggest
from tests.device import results, schedule
from tests.device.carrying import pieces, wheels
from tests.device.processes import ALL, Processes

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 570.0
SLOWER = 20.0  # a rehearsal's clock: its CPU is slower than the device, and may be busy


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0 success, 1 something failed, 2 invalid request."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.device.full_size", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="stop by itself after these (default: 570)")
    parser.add_argument("--out", type=Path, help="folder for records, index and log")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of what the machine lacks")
    parser.add_argument("--energy", action="store_true", help="also measure energy, in windows of two seconds")
    parser.add_argument("--weights", action="append", default=[], metavar="MODEL=DIR", help="pieces of a checkpoint")
    parser.add_argument("--model", action="append", default=[], help="these models only")
    parser.add_argument("--optimization", action="append", default=[], help="these optimizations only")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("present", help="print the installed packages, one a line")
    fetching = commands.add_parser("wheels", help="download the wheels that such a machine lacks")
    fetching.add_argument("folder", type=Path)
    fetching.add_argument("--present", type=Path, required=True, help="file with the packages there, one a line")
    fetching.add_argument("--python", help="version of Python there (default: the one that the file names)")
    splitting = commands.add_parser("split", help="split a file into pieces that can be carried")
    splitting.add_argument("file", type=Path)
    splitting.add_argument("folder", type=Path)
    commands.add_parser("rehearse", help="run the whole programme on the CPU, with tiny models")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "present":
            found = {f"{dist.metadata['Name']}=={dist.version}" for dist in importlib.metadata.distributions()}
            print(f"Python=={platform.python_version()}", *sorted(found), sep="\n")
            return 0
        if chosen.command == "wheels":
            names = chosen.present.read_text(encoding="utf-8").split()
            for wheel in wheels.fetch(chosen.folder, names, chosen.python or wheels.python_of(names)):
                print(f"{wheel.stat().st_size / 2**20:7.1f} MiB  {wheel.name}")
            return 0
        if chosen.command == "split":
            print(*pieces.split(chosen.file, chosen.folder), sep="\n")
            return 0
        if chosen.out is None:
            raise UserError("--out: expected a folder for what is brought home")
        _check_names(chosen)
        if chosen.command == "rehearse":
            from tests.device import rehearsal

            with rehearsal.tiny_models() as (environment, optimizations):
                return session(chosen, "cpu", environment, optimizations)
        return session(chosen, "cuda", {}, schedule.OPTIMIZATIONS)
    except UserError as error:
        sys.stderr.write(f"full_size: {error}\n")
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"full_size: {error.name} is not installed in this Python; call python build.py list once, then: "
            "source .venv/bin/activate\n"
        )
    return 2


def _check_names(chosen: argparse.Namespace) -> None:
    """Raise UserError for a model or an optimization that is not part of a session."""
    own = [entry.partition("=")[0] for entry in chosen.weights]
    known = {"model": [*(name for group in schedule.MODELS for name in group), *own]}
    known["optimization"] = [*schedule.OPTIMIZATIONS]
    for option, valid in known.items():
        for name in getattr(chosen, option):
            if name not in valid:
                raise UserError(f"--{option} {name}: expected one of {', '.join(valid)}.{suggest(name, valid)}")


def session(
    chosen: argparse.Namespace, device: str, environment: Mapping[str, str], optimizations: Mapping[str, Mapping]
) -> int:
    """Run everything on `device` until the time is up; return the exit code."""
    slower = 1.0 if device == "cuda" else SLOWER
    clock = schedule.Clock(chosen.seconds, slower=slower)
    target = tempfile.mkdtemp(prefix="packages-")
    unpacked = _packages(chosen.wheels, Path(target))
    os.environ.update(environment | {"PYTHONPATH": os.pathsep.join(_paths(target)), "WORKBENCH_CHILDREN": "none"})
    dimensions = ALL if chosen.energy else ALL[:3]
    about = _about(chosen.seconds, device, unpacked) | ({"clock_slower": slower} if slower != 1 else {})
    kept = results.Results(chosen.out, about)
    executor = Processes(kept.log, device, lambda: free_bytes(device), dimensions, kept=2, slower=slower)
    real = _checkpoints(chosen.weights, kept.log)
    wanted = {name: parameters for name, parameters in optimizations.items() if _among(name, chosen.optimization)}
    models = [name for group in schedule.MODELS for name in group if _among(name, chosen.model)]
    sizes = {name: weights_bytes(name) for name in models}
    for model, folder in real.items():
        sizes[model] = float(sum(file.stat().st_size for file in (Path(folder) / model).glob("*.safetensors")))
    margin = schedule.MARGIN_BYTES if device == "cuda" else 2**28
    options: dict[str, Any] = {"energy": chosen.energy}
    options |= {"optimizations": wanted, "checkpoints": real, "margin_bytes": margin}
    positions = {model: _positions(Path(folder) / model) for model, folder in real.items()}
    planned = schedule.steps(sizes, context_bytes=context_bytes, positions=positions, **options)

    def keep(ended: schedule.Ended) -> None:
        kept.keep(ended)
        print(f"{clock.spent:6.0f} s  {ended.status:14}  {ended.step.name}  {ended.reason or ''}".rstrip(), flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # finished steps are kept, and no process is left running
    try:
        outcomes = schedule.run(planned, clock, executor, keep)
    finally:
        executor.close()
        kept.finish(spent_seconds=round(clock.spent, 1))
    counts = {status: sum(ended.status == status for ended in outcomes) for status in {e.status for e in outcomes}}
    print(f"{', '.join(f'{count} {status}' for status, count in sorted(counts.items()))}; {clock.spent:.0f} s")
    return int(any(ended.status in ("failed", "stopped") for ended in outcomes))


def _among(name: str, wanted: Sequence[str]) -> bool:
    return not wanted or name in wanted


def _paths(target: str) -> list[str]:
    return [*filter(None, [str(ROOT), target, os.environ.get("PYTHONPATH")])]


def _packages(folder: Path | None, target: Path) -> list[str]:
    """Unpack missing packages and make them importable; return their names. Raises UserError if one is still absent."""
    unpacked = wheels.unpack(folder, target) if folder else []
    sys.path.insert(1, str(target))
    importlib.invalidate_caches()
    lacking = wheels.missing()
    if lacking:
        what = "; ".join(f"{name} ({why})" for name, why in lacking.items())
        raise UserError(f"packages are missing: {what}; carry them along: --wheels DIR")
    return unpacked


def _about(seconds: float, device: str, unpacked: Sequence[str]) -> dict[str, Any]:
    """Return the index's description of the machine, the code and the time."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    try:
        git = ["git", "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # a bare machine may have no git
        commit = None
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": seconds,
        "device": device,
        "machine": gpu_name() if device == "cuda" else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "packages": versions,
        "packages_unpacked": list(unpacked),
        "commit": commit,
    }


def _nvml() -> tuple[Any, Any]:
    """Return the driver's library and the handle of the device that CUDA uses: the first in CUDA_VISIBLE_DEVICES, or
    the first of all (the driver counts all of them). Raises UserError if there is none.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    try:
        import pynvml

        pynvml.nvmlInit()
        if first.isdigit():
            return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(first))
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(first)
    except Exception as error:  # no package, no driver, no device
        raise UserError(
            f"no NVIDIA device can be used here ({error}); rehearse without one: --out OUT rehearse"
        ) from None


def gpu_name() -> str:
    """Return the name of the device. Raises UserError if there is none."""
    library, handle = _nvml()
    name = library.nvmlDeviceGetName(handle)
    return name.decode() if isinstance(name, bytes) else name


def free_bytes(device: str) -> float:
    """Return the free memory of the device in bytes, as the driver reports it: no model library is loaded here."""
    if device == "cuda":
        library, handle = _nvml()
        return float(library.nvmlDeviceGetMemoryInfo(handle).free)
    from lib import memory_limits

    return float(memory_limits.free_memory_bytes())


def weights_bytes(name: str) -> float:
    """Return the bytes of a model's weights in bfloat16, from its configuration, to within about a tenth."""
    from lib.models import parameters

    whole = parameters.read(name).model_copy(update={"slice": None})
    return 2.0 * parameters.about_slice_parameters(whole)


def context_bytes(name: str, tokens: int) -> float:
    """Return the bytes of the queries, keys and values of all blocks of a model for a prompt, in bfloat16; 0 if its
    configuration comes with its checkpoint, which is small enough to transfer.
    """
    from lib.models import parameters

    whole = parameters.read(name).full
    if not whole:
        return 0.0
    config = whole.get("text_config", whole)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config.get("qk_nope_head_dim", 0) + config.get("qk_rope_head_dim", 0)
    return 2.0 * config["num_hidden_layers"] * tokens * (heads + 2 * groups) * size


def _checkpoints(named: Sequence[str], log: Path) -> dict[str, str]:
    """Join and unpack the pieces of checkpoints; return model → the folder that holds its checkpoint folder.

    A split file is an archive (.zip) of a folder in the hub's layout, or a GGUF file. Raises UserError.
    """
    folders = {}
    for entry in named:
        model, equals, folder = entry.partition("=")
        if not equals:
            raise UserError(f"--weights {entry}: expected MODEL=DIR")
        place = Path(tempfile.mkdtemp(prefix="weights-"))
        joined = pieces.join(Path(folder), place)
        if joined.suffix == ".gguf":
            _convert(joined, place / model, log)
        else:
            pieces.unpack(joined, place / model)
        folders[model] = str(place)
    return folders


def _convert(file: Path, folder: Path, log: Path) -> None:
    """Convert a GGUF file to a checkpoint folder in a separate process: this one loads no model library."""
    command = [sys.executable, "-m", "lib.models.sources.convert", str(file), str(folder)]
    with log.open("ab") as output:
        if subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=False).returncode:
            raise UserError(f"{file.name}: could not be converted into a checkpoint folder; {log} says why")


def _positions(folder: Path) -> int:
    """Return the longest context that a checkpoint allows."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("text_config", config)["max_position_embeddings"])


if __name__ == "__main__":
    sys.exit(main())
