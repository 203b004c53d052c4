"""Migration from earlier versions: names that have changed in records, parameters and requests.

`upgrade` converts a record's plain JSON from any earlier schema to the present one. Schema 2 renamed the generated task
from `recall` to `retrieval`, the machine's `processor` to `cpu`, and the training steps after pruning to
`finetune_steps`; it added the answers to "What would refute it". Schema 3 added the primary measurement of each
dimension: verdicts of earlier records were reached without one and are kept unchanged (among them "mixed", which is no
longer used). Nothing else is renamed, and nothing is judged again.
"""

from collections.abc import Callable, Mapping
from typing import Any

METRICS = {"recall_exact_match": "retrieval_exact_match", "processor_utilisation": "cpu_utilisation"}
PARAMETERS = {"recovery_steps": "finetune_steps", "fine_tuning_steps": "finetune_steps"}
TASKS = {"recall": "retrieval"}
_PROCESS = {"processor_percent": "cpu_percent"}
_ENVIRONMENT = {"processor": "cpu"}


def upgrade(content: Any) -> Any:
    """Return a record's plain JSON in the present schema; damaged content or a newer schema is returned unchanged.

    Nothing is dropped: fields of an unexpected type keep their value, and the record's validation reports them.
    """
    if not isinstance(content, dict) or content.get("schema") not in (1, 2):
        return content
    if content["schema"] == 2:
        return content | {"schema": 3}
    changed = dict(content) | {"schema": 3}
    for field, renew in (
        ("parameters", _parameters),
        ("environment", lambda card: _renamed(card, _ENVIRONMENT)),
        ("process", lambda process: _renamed(process, _PROCESS)),
        ("measurements", _measurements),
        ("controls", _controls),
    ):
        if content.get(field):
            changed[field] = renew(content[field])
    return changed


def _parameters(values: Any) -> Any:
    renamed = _renamed(values, PARAMETERS)
    if isinstance(renamed, dict) and isinstance(renamed.get("tasks"), list):
        renamed["tasks"] = [TASKS.get(task, task) if isinstance(task, str) else task for task in renamed["tasks"]]
    return renamed


def _controls(values: Any) -> Any:
    def renew(control: dict[str, Any]) -> dict[str, Any]:
        return (
            control | {"measurements": _measurements(control["measurements"])} if "measurements" in control else control
        )

    return _each(values, renew)


def _measurements(values: Any) -> Any:
    def renew(measurement: dict[str, Any]) -> dict[str, Any]:
        names = {"metric": METRICS, "workload": TASKS}
        known = {field: measurement[field] for field in names if isinstance(measurement.get(field), str)}
        return measurement | {field: names[field].get(value, value) for field, value in known.items()}

    return _each(values, renew)


def _each(values: Any, renew: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    if not isinstance(values, list):
        return values
    return [renew(value) if isinstance(value, dict) else value for value in values]


def _renamed(values: Any, names: Mapping[str, str]) -> Any:
    if not isinstance(values, Mapping):
        return values
    return {names.get(name, name): value for name, value in values.items()}
