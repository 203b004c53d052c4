"""The environment card: machine, software and load at the time of a record. Knows nothing about results."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lib import memory_limits
from lib.measure.timing import disturbance
from lib.measure.trackers import energy_source

if TYPE_CHECKING:
    from torch import nn

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "scikit-learn", "psutil", "zeus")


def card(
    model: "nn.Module | None" = None,
    *,
    weights_hash: str | None = None,
    data_hash: str | None = None,
    at: str | None = None,
) -> dict[str, object]:
    """Return the card as plain JSON values; what cannot be read is None.

    `model` (a torch module) adds its number of parameters (tied ones once), dtype, device and backends. `weights_hash`
    is the hash of the effective weights, `data_hash` that of the evaluation data. `at` is a directory inside the
    repository whose commit is stated.
    """
    machine = {
        "cpu": energy_source.cpu_name(),
        "architecture": platform.machine(),
        "cores_given": disturbance.cores_given(),
        "cores_of_machine": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_given_bytes": memory_limits.memory_bytes(),
        "operating_system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(Path(at) if at else Path(__file__).parent),
        "load_at_start": _load(),
        "jobs_beside": _jobs_beside(),
        "weights_hash": weights_hash,
        "data_hash": data_hash,
        "energy": energy_source.facts(next(model.parameters()).device.type if model is not None else "cpu"),
    }
    return {**machine, **_torch(model), **_gpu()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """Return the repository's commit, followed by "+changes" if tracked files differ from it."""
    git = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+changes" if changed.returncode else "")


def _load() -> float | None:
    """Return the one-minute load average."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def _jobs_beside() -> int | None:
    """Return how many other jobs of the build run at the same time; None outside a build."""
    jobs = os.environ.get("WORKBENCH_JOBS", "")  # includes this job
    return max(0, int(jobs) - 1) if jobs.isdigit() else None


def _torch(model: "nn.Module | None") -> dict[str, object]:
    import torch

    from lib.models.checkpoints import fastest_dtype

    facts: dict[str, object] = {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if model is not None:
        model_config: Any = model.config
        weight, config = next(model.parameters()), model_config.get_text_config()
        dtype = str(weight.dtype).removeprefix("torch.")
        facts |= {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": dtype,
            "dtype_because": fastest_dtype.reason(config.to_dict(), dtype) if weight.device.type == "cpu" else None,
            "device": str(weight.device),
            "attention_backend": getattr(config, "_attn_implementation", None),
            "experts_backend": getattr(config, "_experts_implementation", None),
        }
    return facts


def _gpu() -> dict[str, object]:
    handle = disturbance.gpu_handle()
    if handle is None:
        return {"gpu": None}
    import pynvml
    import torch

    try:
        power = pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    except pynvml.NVMLError:
        power = None
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_memory_bytes": torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
        "gpu_driver": pynvml.nvmlSystemGetDriverVersion(),
        "cuda": torch.version.cuda,
        "gpu_power_limit_watts": power,
    }
