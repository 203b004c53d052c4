"""The notice above results at scale `proxy` or `slice`: they are of a stand-in, not of the model it is named after.

The number of parameters comes from the record. Works on records and on their plain JSON, and imports almost nothing,
so that the command line can print the notice too.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lib.report.text.quantities import quantity
from lib.report.text.wording import model_title

TRANSFERS = (
    "What transfers: how a mechanism works and is tested, and shares (of weights, bytes, operations). What does not: "
    "absolute speed, and the quality of the real model."
)
OF_A_SLICE = (
    "What transfers: speed and bytes of these blocks. What does not: anything about answers, and the time of the whole "
    "model."
)
PROXY, SLICE = "proxy", "slice"
BEGINNING = ("A stand-in", "Stand-ins")


def size(record: Any) -> float | None:
    """Return the parameter count of a record's baseline, from a Record or its plain JSON; None where it is unknown."""
    content = record if isinstance(record, Mapping) else {
        "environment": record.environment,
        "measurements": [{"metric": m.metric, "baseline": m.baseline} for m in record.measurements],
    }  # fmt: skip
    known = (content.get("environment") or {}).get("parameters")
    if known:
        return float(known)
    counts = (m.get("baseline") for m in content.get("measurements") or [] if m.get("metric") == "parameters")
    return next((float(count) for count in counts if count), None)


def sizes(records: Iterable[Any]) -> dict[str, float | None]:
    """Return model → parameter count of its baseline (None if unknown), for every model of the records."""
    by_model: dict[str, float | None] = {}
    for record in records:
        model = record["model"] if isinstance(record, Mapping) else record.model
        if by_model.setdefault(model, None) is None:
            by_model[model] = size(record)
    return dict(sorted(by_model.items()))


def of_model(scale: str, model: str, parameters: float | None) -> str:
    """Return the notice for one model at `scale`; empty for the real model."""
    name = model_title(model)
    if scale == SLICE:
        return f"The first blocks of {name} at their real dimensions, with random weights; not {name}. {OF_A_SLICE}"
    if scale != PROXY:
        return ""
    of = f" of {quantity(parameters, 'parameters')} parameters" if parameters else ""
    what = f"A stand-in{of} with {name}'s architecture, trained on a small corpus and synthetic tasks; not {name}."
    return f"{what} {TRANSFERS}"


def of_records(records: Iterable[Any]) -> str:
    """Return the notices for records or their plain JSON, one per scale; empty for real models.

    Each notice names only the models of its scale, so that a real model among stand-ins is not called one.
    """
    by_scale: dict[str, list[Any]] = {}
    for record in records:
        by_scale.setdefault(record["scale"] if isinstance(record, Mapping) else record.scale, []).append(record)
    return " ".join(filter(None, (of_models(scale, sizes(by_scale[scale])) for scale in sorted(by_scale))))


def of_models(scale: str, known: Mapping[str, float | None]) -> str:
    """Return the notice for the models of a set at `scale`; empty for real models and for an empty set.

    `known` is model → parameter count (`sizes`).
    """
    if len(known) == 1:
        return of_model(scale, *next(iter(known.items())))
    names = [model_title(model) for model in known]
    if scale == SLICE and names:
        return f"The first blocks at real dimensions, with random weights; not {_either(names)}. {OF_A_SLICE}"
    if scale != PROXY or not names:
        return ""
    last = [model for model, count in known.items() if count][-1:]  # names the unit for all
    unit = {model: " parameters" for model in last}
    listed = [
        model_title(model) + (f" ({quantity(count, 'parameters')}{unit.get(model, '')})" if count else "")
        for model, count in known.items()
    ]
    what = f"Stand-ins with the architectures of {_and(listed)}; not the models themselves."
    return f"{what} They were trained on a small corpus and synthetic tasks. {TRANSFERS}"


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _either(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def on(scale: str, model: str, parameters: float | None) -> str:
    """Return the model's name for a title; a stand-in is called one, with its size."""
    if scale == SLICE:
        return f"the first blocks of {model_title(model)}"
    if scale != PROXY:
        return model
    size_of = f" ({quantity(parameters, 'parameters')} parameters)" if parameters else ""
    return f"a stand-in for {model_title(model)}{size_of}"


def of_folder(folder: Path) -> str:
    """Return the notices for a result folder, from its JSON files alone; empty where none can be read."""
    by_scale: dict[str, dict[str, float | None]] = {}
    for path in sorted(Path(folder).glob("*--*.json")):
        model = path.name.removesuffix(".json").split("--", 1)[1]
        if not path.is_file():  # reading a pipe would block
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = by_scale.setdefault(content["scale"], {})
            if known.get(model) is None:
                known[model] = size(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    texts = (of_models(scale, dict(sorted(by_scale[scale].items()))) for scale in sorted(by_scale))
    return " ".join(filter(None, texts))
