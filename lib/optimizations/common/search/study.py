"""Resumable studies: evaluations are stored as an Optuna study in a SQLite file, and a restarted search resumes there.

A study belongs to one search space, described by plain JSON. A file that is damaged or belongs to a different space is
renamed, kept and reported, never overwritten. Every proposal depends only on the seed and the completed trials, so an
interrupted and restarted search ends with the same answer.
"""

import hashlib
import json
import platform
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL

from lib import files
from lib.errors import UserError

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass
class Study:
    """A study of one search space, in a file or (if `path` is None) in memory. `notes` says what happened on opening.

    `memory` mirrors the completed trials of the file: trials are proposed there, and only completed ones are written.
    """

    memory: optuna.Study
    file: optuna.Study | None
    path: Path | None
    notes: list[str] = field(default_factory=list)
    storage: optuna.storages.RDBStorage | None = None

    @property
    def trials(self) -> list[FrozenTrial]:
        """Completed trials in the order in which they were stored."""
        return self.memory.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def fact(self, name: str, make: Callable[[], object]) -> object:
        """Return the stored fact `name` (plain JSON), calling `make` to create it only if it is not stored yet."""
        if name not in self.memory.user_attrs:
            text = json.dumps(make())
            for study in filter(None, (self.file, self.memory)):
                study.set_user_attr(name, text)
        return json.loads(self.memory.user_attrs[name])

    def add(
        self,
        params: Mapping[str, object],
        distributions: Mapping[str, BaseDistribution],
        values: Sequence[float],
        facts: Mapping[str, object] | None = None,
    ) -> None:
        """Store a trial that was proposed elsewhere."""
        self._store(
            optuna.trial.create_trial(
                params=dict(params),
                distributions=dict(distributions),
                values=list(values),
                user_attrs=dict(facts or {}),
            )
        )

    def propose(
        self, distributions: Mapping[str, BaseDistribution], sampler: Callable[[int], optuna.samplers.BaseSampler]
    ) -> dict[str, object]:
        """Return the parameters of the next trial, proposed by a fresh `sampler(number of completed trials)`."""
        self.memory.sampler = sampler(len(self.trials))
        trial = self.memory.ask(dict(distributions))
        self.memory.tell(trial, state=TrialState.FAIL)  # a proposal only: `add` stores it with its values
        return dict(trial.params)

    def _store(self, trial: FrozenTrial) -> None:
        for study in filter(None, (self.file, self.memory)):
            study.add_trial(trial)


def fingerprint(space: Mapping[str, object]) -> str:
    """Return the hash of a search space (plain JSON), independent of the order of its keys."""
    return hashlib.sha256(json.dumps(space, sort_keys=True, default=str).encode()).hexdigest()


def code(*modules: ModuleType, parts: Iterable[ModuleType] = ()) -> str:
    """Return a hash of the modules' source files: changed code makes a different search space.

    `parts` are optimizations. If one has a folder, all its files are hashed, since its method uses them.
    """
    files_of = [Path(str(module.__file__)) for module in modules]
    for part in parts:
        method = Path(str(part.__file__))
        files_of += sorted(method.parent.rglob("*.py")) if method.name == "method.py" else [method]
    digest = hashlib.sha256()
    for file in files_of:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def machine() -> str:
    """Return a name for this machine: measured times hold on this machine only."""
    return f"{platform.node()} {platform.machine()} {platform.processor()}".strip()


@contextmanager
def opened(path: Path | str | None, name: str, space: Mapping[str, object], objectives: int) -> Iterator[Study]:
    """Yield the study `name` in the file `path` (None: in memory), new or resumed, locked against other processes.

    Raises UserError if another process is searching in the same file, or if the file cannot be written.
    """
    if path is None:
        yield _make(None, name, space, objectives)
        return
    path = Path(path)
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(path.with_name(f".{path.name}.lock")))
        except files.Held as holder:
            raise UserError(
                f"{path.name}: another run is searching in it ({holder}); wait for it, or give another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written to ({error.strerror}); give another folder for studies"
            ) from None
        notes = _set_aside(path, name, space)
        study = _make(path, name, space, objectives)
        study.notes += notes
        if study.trials:
            study.notes.append(f"{path.name}: resumed, {len(study.trials)} evaluations stored")
        try:
            yield study
        finally:
            if study.storage is not None:
                study.storage.remove_session()


def _make(path: Path | None, name: str, space: Mapping[str, object], objectives: int) -> Study:
    directions: list[Literal["minimize"]] = ["minimize"] * objectives
    memory = optuna.create_study(study_name=name, directions=directions)
    if path is None:
        return Study(memory, None, None)
    storage = optuna.storages.RDBStorage(_address(path))
    file = optuna.create_study(study_name=name, directions=directions, storage=storage, load_if_exists=True)
    if "space" not in file.user_attrs:
        file.set_user_attr("space", fingerprint(space))
    for fact, text in file.user_attrs.items():
        memory.set_user_attr(fact, text)
    memory.add_trials(file.get_trials(states=(TrialState.COMPLETE,)))
    return Study(memory, file, path, storage=storage)


def _address(path: Path) -> str:
    """Return the SQLite URL of a file, escaped for Optuna, which expands `{…}` and interprets `?` and `%`."""
    return URL.create("sqlite", database=str(path)).render_as_string().replace("{", "{{").replace("}", "}}")


def _set_aside(path: Path, name: str, space: Mapping[str, object]) -> list[str]:
    """Rename a file that is damaged or belongs to another space; return notes on what was done."""
    if not path.exists():
        return []
    reason = _unusable(path, name, space)
    if reason is None:
        return []
    renamed = path.rename(files.aside(path))
    for journal in path.parent.glob(f"{path.name}-*"):  # SQLite journals of the renamed file
        journal.rename(renamed.with_name(renamed.name + journal.name.removeprefix(path.name)))
    return [f"{path.name}: {reason}; kept as {renamed.name}, a new study was started"]


def _unusable(path: Path, name: str, space: Mapping[str, object]) -> str | None:
    """Return why the file cannot be resumed, or None. Reads with SQLite alone, since Optuna would write to it; SQLite
    first rolls back a commit that was cut off, for which the file has to be writable.
    """
    query = """select value_json from study_user_attributes join studies using (study_id)
               where study_name = ? and key = 'space'"""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as file:
            if file.execute("pragma quick_check").fetchone()[0] != "ok":
                return "the study file is damaged"
            stored = file.execute(query, (name,)).fetchone()
    except (sqlite3.DatabaseError, OSError):
        return "the study file is damaged"
    if stored is None:
        return f'it holds no study "{name}"'
    return None if json.loads(stored[0]) == fingerprint(space) else "it belongs to another search space"
