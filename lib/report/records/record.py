"""The record: every result of one notebook run on one model. The only module that knows scrapbook.

Builds a record in a notebook, glues it, reads it back from the executed notebook and from its JSON file. Scrapbook
reads NaN back as a string and rejects numpy scalars and None, so a record is glued as plain JSON
(`lib.report.records.codec`). Independent of how a number is measured (`lib.measure`), judged
(`lib.report.records.verdicts.verdict`) and displayed.
"""

import gc
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib.errors import UserError
from lib.files import visible, write_atomically
from lib.measure.metrics import settings
from lib.measure.metrics.busy import withhold_if_busy
from lib.measure.metrics.catalogue import DIMENSIONS, METRICS
from lib.measure.metrics.measurement import Measurement
from lib.report.records import codec, grammars, migration, relation
from lib.report.records.refutation import Refutation
from lib.report.records.relation import Relation
from lib.report.records.verdicts.unchanged import withhold_if_unchanged
from lib.report.records.verdicts.verdict import Verdict, judge, withhold_if_invalid

SCHEMA: Literal[3] = 3
SCRAP = "record"
MOST_NOTEBOOKS = 400
ADDED_BY_RUNNER = ("status", "reason", "key", "started", "seconds", "process", "log")
Dimension = Literal["performance", "accuracy", "resources", "efficiency"]
Status = Literal["ok", "failed", "not_applicable"]


class Control(BaseModel):
    """What keeps a claim honest: a third arm (random saliency) or a copy of the baseline, with its own numbers."""

    model_config = ConfigDict(extra="forbid")
    name: str
    purpose: str = ""
    measurements: list[Measurement] = []


class Process(BaseModel):
    """Samples of the run's own process tree, recorded by the runner during the run.

    `seconds`, `cpu_percent` (100 is one core) and `memory_bytes` are of equal length. `cell_seconds` counts the
    executed notebook's code cells.
    """

    model_config = ConfigDict(extra="forbid")
    seconds: list[float] = []
    cpu_percent: list[float] = []
    memory_bytes: list[float] = []
    interval_seconds: float | None = None
    cores: int | None = None
    pinned_to: list[int] = []
    jobs_side_by_side: int | None = None
    cell_seconds: dict[str, float] = {}
    provenance: Literal["measured"] = "measured"
    source: str = "psutil, the kernel and its children; 100 % is one core"


class Record(BaseModel):
    """One notebook run on one model. Field `schema_version` is written as `schema`.

    `dimensions` are those that were requested; None where all four were: only such a record is complete. `primaries`
    are the measurements (metric, workload) that the template declared to decide each dimension's verdict; those that
    did decide it are named there.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    schema_version: Literal[3] = Field(SCHEMA, alias="schema")
    optimization: str
    model: str
    scale: str
    effort: str
    dimensions: list[Dimension] | None = None
    status: Status = "ok"
    reason: str | None = None
    key: str | None = None
    started: str | None = None
    seconds: float | None = None
    parameters: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    primaries: dict[Dimension, tuple[str, str]] = {}
    measurements: list[Measurement] = []
    controls: list[Control] = []
    refutations: list[Refutation] = []
    relations: list[Relation] = []
    details: dict[str, Any] = {}
    verdict: Verdict = Verdict()
    process: Process | None = None
    log: str | None = None

    @property
    def stem(self) -> str:
        """The file name without suffix. Model names contain dots: append a suffix, never replace one."""
        return f"{self.optimization}--{self.model}"


def build(
    optimization: str,
    model: str,
    scale: str,
    effort: str,
    parameters: Mapping[str, Any],
    measurements: Iterable[Measurement] = (),
    controls: Iterable[Control | Mapping[str, Any]] = (),
    details: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    *,
    refutations: Iterable[Refutation] = (),
    relations: Iterable[Relation | tuple[str, str, str, bool | None, str]] = (),
    primaries: Mapping[str, tuple[str, str]] | None = None,
    status: Status = "ok",
    reason: str | None = None,
) -> Record:
    """Return the record of a run, its verdict computed from the measurements.

    Only measurements and controls of the requested dimensions are included (`lib.measure.metrics.settings`). If the
    model's output has degenerated, ratios and intervals of performance and efficiency are removed. Timings are not
    judged if the machine was too busy or the stack in `details` is empty. `primaries` declares which (metric, workload)
    decides each dimension's verdict (`lib.report.records.verdicts.primary`). `status="not_applicable"` or `"failed"`
    needs a `reason`. Raises TypeError for a value that JSON cannot hold, ValueError for a primary that is not a metric
    of its dimension.
    """
    if status != "ok" and not reason:
        raise ValueError(f'a record with status "{status}" needs a reason')
    declared = dict(primaries or {})
    for dimension, (metric, _) in declared.items():
        if dimension not in DIMENSIONS or (metric in METRICS and METRICS[metric].dimension != dimension):
            raise ValueError(f"primaries: {metric} is not a metric of {dimension}")
    requested = settings.requested_dimensions()
    wanted = requested or DIMENSIONS
    withheld = withhold_if_unchanged(withhold_if_busy(withhold_if_invalid(list(measurements))), details or {})
    judged = [m for m in withheld if m.dimension in wanted]
    all_controls = [item if isinstance(item, Control) else Control.model_validate(item) for item in controls]
    for control in all_controls:
        control.measurements = [m for m in withhold_if_busy(control.measurements) if m.dimension in wanted]
    return Record(
        schema_version=SCHEMA,
        optimization=optimization,
        model=model,
        scale=scale,
        effort=effort,
        dimensions=cast(list[Dimension], list(requested)) if requested else None,
        status=status,
        reason=reason,
        parameters=codec.decode(codec.encode(dict(parameters), "parameters")),
        environment=codec.decode(codec.encode(_as_mapping(environment), "environment")),
        measurements=judged,
        controls=[control for control in all_controls if control.measurements or not requested],
        primaries=cast(dict[Dimension, tuple[str, str]], declared),
        refutations=list(refutations),
        relations=[item if isinstance(item, Relation) else relation.decide(*item) for item in relations],
        details=codec.decode(codec.encode(dict(details or {}), "details")),
        verdict=judge(judged, status, reason, requested, declared, effort),
    )


def _as_mapping(value: Any) -> dict[str, Any]:
    encoded = codec.encode(value) if value is not None else {}
    return encoded if isinstance(encoded, dict) else {"card": encoded}


def labelled(value: Any, provenance: str, source: str, **about: str) -> dict[str, Any]:
    """Return an entry for `details` that holds numbers: the value with provenance and source, as the lint requires.

    `about` adds further text; an impact curve names its axes with `x` and `y` (`lib.report.analysis.strength_curves`).
    Raises ValueError for another provenance or an empty source.
    """
    if provenance not in ("measured", "derived", "estimated") or not source:
        raise ValueError(
            f'a number is measured, derived or estimated, and has a source; got "{provenance}", "{source}"'
        )
    return {"provenance": provenance, "source": source, **about, "value": value}


def to_json(record: Record) -> dict[str, Any]:
    """Return the record as plain JSON."""
    return codec.encode(record.model_dump(by_alias=True, mode="python"), "record")


def from_json(content: Any, where: str) -> Record:
    """Return the record in the plain JSON `content`. Raises UserError, naming the file `where`, the fault and what to
    do.
    """
    advice = "Delete it or build it again."
    if not isinstance(content, dict) or "schema" not in content:
        raise UserError(f'{where}: not a record: expected a JSON object with "schema": {SCHEMA}. {advice}')
    content = migration.upgrade(content)
    if content["schema"] != SCHEMA:
        raise UserError(f"{where}: a record of schema {content['schema']!r}, expected {SCHEMA}. {advice}")
    try:
        return Record.model_validate(codec.decode(content))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise UserError(f'{where}: not a record: "{place}": {fault["msg"].lower()}. {advice}') from None


def write(record: Record, path: Path) -> Path:
    """Write the record as JSON to `path`, atomically; return `path`. Raises OSError."""
    return write_atomically(path, json.dumps(to_json(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: Path, look: Callable[[str, Any], None] | None = None) -> Record:
    """Read a record. Raises UserError where the file is missing, not JSON, or not a record of this schema.

    `look` is called with the stem and the plain JSON before it is validated.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise UserError(f"{path.name}: not a record: not a regular file. Delete it.")
    try:
        text = path.read_text(encoding="utf-8")
        if look is None and (record := _quickly(text)):
            return record
        content = json.loads(text)
    except OSError as error:
        raise UserError(f"{path.name}: cannot be read ({error.strerror}). Build it again.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        at = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path.name}: not a record: not JSON{at}. Delete it or build it again.") from None
    if look:
        look(path.name.removesuffix(".json"), content)
    return from_json(content, path.name)


def _quickly(text: str) -> Record | None:
    """Return the record of a JSON text that needs no migration and holds no tagged float; None otherwise."""
    if f'"{codec.TAG}"' in text:
        return None
    try:
        record = Record.model_validate_json(text)
    except (ValidationError, UserError):  # UserError: a metric that has been renamed
        return None
    return record if "schema_version" in record.model_fields_set else None


def read_folder(folder: Path, look: Callable[[str, Any], None] | None = None) -> tuple[list[Record], dict[str, str]]:
    """Return every record in `folder`, sorted by stem, and the damaged files as stem → error message.

    A record under another run's name, such as a copy, is damaged: it would count twice.
    """
    records, damaged = [], {}
    with _uncollected():  # thousands of records hold millions of objects
        for path in visible(Path(folder), "*--*.json"):
            stem = path.name.removesuffix(".json")
            try:
                record = read(path, look)
                if record.stem != stem:
                    raise UserError(f"{path.name}: holds the record of {record.stem}; expected {stem}. Delete it.")
                records.append(record)
            except UserError as error:
                damaged[stem] = str(error)
    return records, damaged


@contextmanager
def _uncollected():
    """Disable garbage collection inside the block: where many objects are created and kept, every pass is wasted."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def glue(record: Record) -> None:
    """Store `record` in the running notebook as one JSON scrap. Called only by the cell tagged `record`."""
    with _uncollected():  # every pass is slow while a model is loaded
        scrapbook = _scrapbook()
    scrapbook.glue(SCRAP, to_json(record), encoder="json")


def _scrapbook() -> ModuleType:
    grammars.refuse()
    import scrapbook

    return scrapbook


def from_notebook(path: Path) -> Record | None:
    """Return the record glued in an executed notebook, read through scrapbook; None where there is none.

    Raises UserError where the file is not a notebook or the scrap is not a record.
    """
    path, scrapbook = Path(path), _scrapbook()
    try:
        scraps = scrapbook.read_notebook(str(path)).scraps
    except Exception as error:  # papermill, nbformat, jsonschema and the file system each raise their own
        raise UserError(f"{path.name}: not a readable notebook ({type(error).__name__})") from None
    if SCRAP not in scraps:
        return None
    return from_json(scraps[SCRAP].data, path.name)


def from_notebooks(folder: Path) -> tuple[list[Record], dict[str, str]]:
    """Return the records glued in the notebooks of `folder`, sorted by stem, and the damaged notebooks as stem → error
    message.
    """
    records, damaged = [], {}
    for path in visible(Path(folder), "*--*.ipynb"):
        try:
            record = from_notebook(path)
        except UserError as error:
            damaged[path.name.removesuffix(".ipynb")] = str(error)
        else:
            stem = path.name.removesuffix(".ipynb")
            if record is not None and record.stem != stem:  # such as a copy
                damaged[stem] = f"{path.name}: holds the record of {record.stem}; expected {stem}. Delete it."
            elif record is not None:
                records.append(record)
    return records, damaged


def gather(folder: Path) -> tuple[list[Record], dict[str, str]]:
    """Return every record of a result folder, sorted by stem, and the damaged files as stem → error message.

    A glued record is read through scrapbook, and completed by the fields that the runner added to the JSON file
    (ADDED_BY_RUNNER); a run that failed before gluing is read from its JSON file alone. With more than MOST_NOTEBOOKS
    runs all are read from JSON, which holds the same: opening thousands of notebooks takes many minutes.
    """
    known, damaged = read_folder(folder)
    if len(known) > MOST_NOTEBOOKS:
        return known, damaged
    by_stem = {record.stem: record for record in known}
    glued, unreadable = from_notebooks(folder)
    for record in glued:
        stored = by_stem.get(record.stem)
        added = {name: getattr(stored, name) for name in ADDED_BY_RUNNER} if stored else {}
        by_stem[record.stem] = record.model_copy(update=added)
    return [by_stem[stem] for stem in sorted(by_stem)], damaged | unreadable
