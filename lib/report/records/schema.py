"""The published JSON Schema of records and result files, `schemas/results.schema.json`, and validation against it.

`python -m lib.report.records.schema` regenerates the file from the record's definition and this module; a test checks
that it is up to date. Describes structure only: the numbers are checked by `lib.report.records.checks.lint` and
`lib.report.analysis.acceptance`.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lib.files import write_atomically
from lib.measure.metrics.catalogue import DIMENSIONS
from lib.report.records import grammars
from lib.report.records.record import Record

PATH = Path(__file__).resolve().parent / "schemas" / "results.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
VERSION = 3  # of the result files; their records have the version `lib.report.records.record.SCHEMA`
KINDS = ("comprehensive", "enhanced", "all", "complete")
TEXT, NUMBER, COUNT = {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}
PROVENANCE = {"enum": ["measured", "derived", "estimated"]}


def _maybe(kind: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [kind, {"type": "null"}]}


def _list(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _map(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _to(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


def document() -> dict[str, Any]:
    """Return the schema: a record, or one of the four result files, distinguished by `kind`."""
    record = Record.model_json_schema(by_alias=True)
    defs = record.pop("$defs") | {"Record": record}
    defs["Summary"] = _object(
        expected=COUNT, ok=COUNT, failed=COUNT, not_applicable=COUNT, missing=_list(TEXT), damaged=_map(TEXT),
        partial=_map(_list({"enum": list(DIMENSIONS)})), reasons=_map(_maybe(TEXT)), seconds=NUMBER,
        efforts=_list(TEXT), machines=_list(TEXT), first_started=_maybe(TEXT), last_started=_maybe(TEXT),
    )  # fmt: skip
    point = _object(strength=NUMBER, value=_maybe(NUMBER), low=_maybe(NUMBER), high=_maybe(NUMBER), more=_map(NUMBER))
    defs["Curve"] = _object(
        optimization=TEXT, model=TEXT, effort=TEXT, key=_maybe(TEXT), x=TEXT, y=TEXT, provenance=PROVENANCE,
        source=TEXT, arms=_map(_list(point)),
    )  # fmt: skip
    headline = _object(
        metric=TEXT, workload=TEXT, unit=TEXT, baseline=_maybe(NUMBER), optimized=_maybe(NUMBER),
        ratio=_maybe(NUMBER), ci=_maybe(_list(NUMBER)), verdict=TEXT,
        provenance={"enum": [*PROVENANCE["enum"], "unavailable"]}, source=TEXT,
    )  # fmt: skip
    defs["Run"] = _object(
        optimization=TEXT, model=TEXT, effort=TEXT, status=TEXT, reason=_maybe(TEXT), key=_maybe(TEXT),
        started=_maybe(TEXT), seconds=_maybe(NUMBER), verdict=_to("Verdict"), headlines=_list(headline),
    )  # fmt: skip
    defs["Cell"] = _object(
        optimization=TEXT, model=TEXT, dimension={"enum": list(DIMENSIONS)}, metric=_maybe(TEXT), workload=_maybe(TEXT),
        recorded=TEXT, p=_maybe(NUMBER), q=_maybe(NUMBER), word=TEXT, reason=_maybe(TEXT),
    )  # fmt: skip
    defs["Aggregate"] = _object(
        optimization=TEXT, metric=TEXT, dimension={"enum": list(DIMENSIONS)}, models=_list(TEXT),
        geometric_mean_gain=NUMBER, least=NUMBER, most=NUMBER, verdicts=_map(COUNT), provenance=PROVENANCE,
        source=TEXT,
    )  # fmt: skip
    defs["Coverage"] = _object(
        optimization=TEXT, model=TEXT, status=TEXT, numbers=_map(COUNT), provenance=_map(COUNT), controls=COUNT
    )
    parts = {"records": _list(_to("Record")), "curves": _list(_to("Curve")), "without_curve": _map(TEXT)}
    parts |= {
        "runs": _list(_to("Run")),
        "cells": _list(_to("Cell")),
        "aggregate": _list(_to("Aggregate")),
        "coverage": _list(_to("Coverage")),
    }
    holds = {
        "comprehensive": ("records",),
        "enhanced": ("curves", "without_curve"),
        "all": ("runs", "cells", "aggregate"),
        "complete": tuple(parts),
    }
    for kind, names in holds.items():
        opening = {"schema": {"const": VERSION}, "kind": {"const": kind}, "scale": TEXT}
        opening |= {"optimizations": _list(TEXT), "models": _list(TEXT), "summary": _to("Summary")}
        defs[kind] = _object(**opening, **{name: parts[name] for name in names})
    choices = [_to(name) for name in ("Record", *KINDS)]
    return {
        "$schema": DIALECT,
        "title": f"Records and result files, version {VERSION}",
        "oneOf": choices,
        "$defs": defs,
    }


def text() -> str:
    """Return the text of the schema file."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


@cache
def _validator(name: str) -> Any:
    grammars.refuse()
    from jsonschema import Draft202012Validator

    published = json.loads(PATH.read_text(encoding="utf-8"))
    return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": published["$defs"]})


@cache
def _quick(name: str) -> Callable[[Any], Any]:
    """Return the schema as a compiled validator: ten times faster, but it reports only the first fault, by raising."""
    import fastjsonschema

    published = json.loads(PATH.read_text(encoding="utf-8"))
    document = {"$ref": f"#/$defs/{name}", "$defs": published["$defs"]}
    return fastjsonschema.compile(_as_draft_7(document), use_default=False)


def _as_draft_7(schema: Any) -> Any:
    """Return a schema in the dialect of draft 7, which calls a list with one schema per position `items`."""
    if isinstance(schema, list):
        return [_as_draft_7(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    plain = {name: _as_draft_7(value) for name, value in schema.items()}
    return plain | {"items": plain.pop("prefixItems")} if isinstance(plain.get("prefixItems"), list) else plain


def _is_sound(name: str, content: Any) -> bool:
    from fastjsonschema import JsonSchemaValueException

    try:
        _quick(name)(content)
    except JsonSchemaValueException:
        return False
    return True


def faults(content: Any, most: int = 5) -> list[str]:
    """Return the faults of a record or result file given as plain JSON: a line with the place each, at most `most`."""
    name = content.get("kind", "Record") if isinstance(content, Mapping) else "Record"
    if name not in ("Record", *KINDS):
        return [f"kind {name!r} is none of {', '.join(KINDS)}"]
    if _is_sound(name, content):
        return []
    lines = []
    for error in _validator(name).iter_errors(content):
        place = ".".join(map(str, error.absolute_path)) or "the file"
        lines.append(f"{place}: {error.message[:160]}")
        if len(lines) == most:
            break
    return lines


if __name__ == "__main__":
    write_atomically(PATH, text())
