"""Reads what earlier versions wrote: names that have changed since, in records, parameters and requests.

`upgrade` takes a record's plain JSON of any earlier schema to the present one. Schema 2 renamed the generated task from
`recall` to `retrieval`, the machine's `processor` to `cpu`, and the steps of training after a cut to `finetune_steps`;
it added the answers to what would refute a claim. Renames nothing else and judges nothing.
"""

from collections.abc import Mapping
from typing import Any

METRICS = {"recall_exact_match": "retrieval_exact_match", "processor_utilisation": "cpu_utilisation"}
PARAMETERS = {"recovery_steps": "finetune_steps", "fine_tuning_steps": "finetune_steps"}
TASKS = {"recall": "retrieval"}
_PROCESS = {"processor_percent": "cpu_percent"}
_ENVIRONMENT = {"processor": "cpu"}


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Return a record's JSON in the present schema; what is of this schema already, or of none known, as it is."""
    if content.get("schema") != 1:
        return content
    changed = dict(content) | {"schema": 2}
    changed["parameters"] = _parameters(content.get("parameters") or {})
    changed["environment"] = _renamed(content.get("environment") or {}, _ENVIRONMENT)
    changed["measurements"] = _measurements(content.get("measurements") or [])
    changed["controls"] = [
        dict(control) | {"measurements": _measurements(control.get("measurements") or [])}
        for control in content.get("controls") or []
    ]
    if content.get("process"):
        changed["process"] = _renamed(content["process"], _PROCESS)
    return changed


def _parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    renamed = _renamed(values, PARAMETERS)
    if isinstance(renamed.get("tasks"), list):
        renamed["tasks"] = [TASKS.get(task, task) for task in renamed["tasks"]]
    return renamed


def _measurements(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        dict(one) | {"metric": METRICS.get(one.get("metric"), one.get("metric"))}
        | {"workload": TASKS.get(one.get("workload"), one.get("workload"))}
        for one in values
    ]  # fmt: skip


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}
