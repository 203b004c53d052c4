"""Time and machine of a record, in a few words: the context in which a reader must judge its numbers."""

from collections.abc import Mapping
from typing import Any

from lib.report.text.quantities import counted
from lib.report.text.wording import one_line


def day(started: str | None) -> str:
    """Return an ISO time as `2026-01-31 14:05`, or an empty string."""
    return (started or "")[:16].replace("T", " ")


def machine(environment: Mapping[str, Any]) -> str:
    """Return the machine in a few words from an environment card: GPU or CPU, and the number of cores."""
    name = environment.get("gpu") or environment.get("cpu")
    cores = environment.get("cores_given")
    return one_line(", ".join(part for part in (name, counted(cores, "core") + " given" if cores else "") if part), 90)


def place(environment: Mapping[str, Any]) -> tuple[str, str]:
    """Return (machine, device of the model) from an environment card. Records with different values must not be
    compared.
    """
    return machine(environment), str(environment.get("device") or "")
