"""One build from beginning to end: plan, keys, runs, pages, overview and index. Knows no command line.

Returns the exit code: 0 if every run succeeded, 1 if one failed or the build was stopped. A wrong request raises
UserError before anything has run.
"""

import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from lib.errors import ClusterLost, UserError
from lib.files import Held, locked
from lib.models import parameters as parameter_files
from lib.report.pages.suites import file_names
from lib.suite.plan import cache_key, dependencies, plan
from lib.suite.plan.plan import Job, Request
from lib.suite.run import cpu_affinity, kernel_process
from lib.suite.run.progress import Progress, duration
from lib.suite.store import build_history, result_folder, site
from lib.suite.store.result_folder import Folder, State


class BuildStopped(BaseException):
    """The build was asked to end: Ctrl-C, SIGTERM or a closed terminal."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turn the first terminating signal into `BuildStopped`; ignore further ones during clean-up."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def stop(*_: Any) -> None:
        for name in names:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        raise BuildStopped

    before = {name: signal.signal(getattr(signal, name), stop) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def survey(folder: Folder, jobs: Sequence[Job]) -> list[tuple[Job, dict, State]]:
    """Return each job with the parts of its key and its state."""
    hashes = cache_key.Hashes(folder.hashes)
    templates = {job.optimization: job.template for job in jobs}
    reached = {name: dependencies.reached(template) for name, template in templates.items()}
    surveyed = []
    for job in jobs:
        parts = cache_key.parts(job, hashes, reached)
        surveyed.append((job, parts, result_folder.state(folder, job.stem, parts)))
    if folder.path.is_dir():
        hashes.save()
    return surveyed


def build(
    request: Request,
    out: Path,
    jobs: int | None = None,
    force: bool = False,
    suite: str | None = None,
    cluster: str | None = None,
    again_if_busy: bool = False,
) -> int:
    """Run what is not finished, make the pages, the index and the files of `suite`; return the exit code.

    `force` runs everything again, `again_if_busy` what was measured on a busy machine. `cluster` is the address of the
    Dask scheduler whose workers run it; without one, this machine does.
    """
    planned = plan.plan(request, here=cluster is None)
    side_by_side = jobs if jobs is not None else cpu_affinity.default_jobs(request.scale, request.device)
    shares = cpu_affinity.share_out(side_by_side)
    for kind in ("cell", "run"):
        kernel_process.limit(kind, request.effort)  # a wrong variable is a wrong request
    folder = result_folder.open_folder(out)
    try:
        with _locked(folder), stoppable():
            busy = set(_busy(folder, [job.stem for job in planned])) if again_if_busy else set()
            return _build(folder, planned, shares, force, suite, cluster, busy)
    except BuildStopped:
        print("\nbuild.py: stopped; what was finished is kept, and the same command goes on from there")
        return 1
    except ClusterLost as lost:
        print(f"build.py: {lost}; what was finished is kept, and the same command goes on from there")
        return 1
    except OSError as error:
        where = error.filename or folder.path
        print(f"build.py: {where}: cannot be written ({error.strerror}); stopped, what was finished is kept")
        return 1


@contextlib.contextmanager
def _locked(folder: Folder) -> Iterator[None]:
    """Hold the folder's lock. Raises UserError where another build has it."""
    try:
        with locked(folder.lock):
            yield
    except Held as holder:
        raise UserError(
            f"{folder.path}: another build is at work there ({holder}); wait for it or give another folder with --out"
        ) from None


def _build(
    folder: Folder,
    planned: Sequence[Job],
    shares: Sequence[Sequence[int]],
    force: bool,
    suite: str | None,
    cluster: str | None,
    busy: Collection[str],
) -> int:
    surveyed = survey(folder, planned)
    _tidy(folder)
    to_run = [(job, parts) for job, parts, state in surveyed if force or state.must_run or job.stem in busy]
    to_render = [job.stem for job, _, state in surveyed if not force and state.kind == "unrendered"]
    for job, _, state in surveyed:
        if state.kind == "damaged":
            print(f"build.py: {state.why}: running {job.stem} again")
    finished = len(planned) - len(to_run)
    if finished:
        print(f"{finished} of {len(planned)} runs are finished already and kept")
    expected = {job.stem: state.seconds for job, _, state in surveyed if state.seconds}
    results = _run(folder, to_run, shares, planned, expected, cluster) if to_run else []
    faults = _render(folder, to_render, planned)
    faults += build_history.keep(folder, suite or "run")
    faults += _overview(folder, shares)
    faults += site.finish(folder, suite)
    short = site.short_of_curves(folder) if suite == "enhanced" else []
    for line in short:
        print(f"SHORT {line}")
    for stem, reason in _busy(folder, [job.stem for job in planned]).items():
        print(f"BUSY {stem}: {reason}")
    return _summary(folder, len(planned), results, faults) or bool(short)


def _pool_process_variance(folder: Folder) -> None:
    """Tell the runs what earlier ones on this machine showed of the variance between processes."""
    from lib.report.analysis.noise import process_draws

    with contextlib.suppress(UserError):  # a history that cannot be read is reported when the build ends
        process_draws.publish(folder.path, build_history.store_of(folder.path))


def _run(
    folder: Folder, to_run: list, shares: Sequence, planned: Sequence[Job], expected: dict, address: str | None
) -> list:
    from lib.suite.run import schedule

    _pool_process_variance(folder)
    neighbours = sorted({*result_folder.present(folder), *((job.optimization, job.model) for job in planned)})
    entries = [schedule.Entry(job, cache_key.of(parts), parts) for job, parts in to_run]
    with _temporary(folder) as temporary, Progress([job.stem for job, _ in to_run], len(shares), expected) as progress:
        shared = schedule.BuildContext(folder, shares, temporary, neighbours, progress)
        if address:
            from lib.suite.cluster import dask

            return dask.run(shared, entries, address)
        return schedule.run(shared, entries)


@contextlib.contextmanager
def _temporary(folder: Folder) -> Iterator[Path]:
    """Make a folder for the notebooks' temporary files; its path is stored, so that the next build can remove it."""
    path = Path(tempfile.mkdtemp(prefix="workbench-"))
    folder.running.mkdir(parents=True, exist_ok=True)
    (folder.running / "temporary").write_text(str(path), encoding="utf-8")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(folder.running, ignore_errors=True)


def _tidy(folder: Folder) -> None:
    """Remove the leftovers of a build that was killed. Call only while holding the lock."""
    with contextlib.suppress(OSError):
        path = Path((folder.running / "temporary").read_text(encoding="utf-8"))
        if path.name.startswith("workbench-"):
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder.running, ignore_errors=True)
    for part in folder.path.glob(".*.part"):
        part.unlink(missing_ok=True)


def _render(folder: Folder, stems: Sequence[str], planned: Sequence[Job]) -> list[str]:
    if not stems:
        return []
    from lib.suite.store import render

    neighbours = sorted({*result_folder.present(folder), *((job.optimization, job.model) for job in planned)})
    return [fault for stem in stems if (fault := render.render(folder.path, stem, neighbours))]


def _overview(folder: Folder, shares: Sequence[Sequence[int]]) -> list[str]:
    """Execute `overview.ipynb` over the records, last of all, unless none of them has changed."""
    path = plan.NOTEBOOKS / f"{plan.OVERVIEW}.ipynb"
    if not path.is_file():
        return []
    from lib.suite.run import overview

    if overview.up_to_date(folder, path):
        return []
    with _temporary(folder) as temporary:
        fault = overview.execute(folder, path, [core for share in shares for core in share], temporary)
    return [fault] if fault else []


def _busy(folder: Folder, stems: Sequence[str]) -> dict[str, str]:
    """Return stem → why nothing timed is judged, of the finished runs that were measured on a busy machine."""
    from lib.report.analysis.noise import busy_runs

    reasons = busy_runs.reasons(folder.path, stems)
    return {stem: f"{reason} (--busy runs it again)" for stem, reason in reasons.items()}


def _summary(folder: Folder, total: int, results: Sequence, faults: Sequence[str]) -> int:
    """Print the last lines; return the exit code."""
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        print(f"FAILED {result.stem}: {result.reason}" + (f" (notebook: {result.notebook})" if result.notebook else ""))
    for fault in faults:
        print(f"FAILED {fault}")
    _say_what_ran(folder.path)
    took = sum(result.seconds for result in results)
    ran = f"{len(results)} run ({duration(took)} of work)" if results else "nothing had to be run"
    print(f"{total - len(failed)} of {total} well, {len(failed)} failed; {ran}; {_shown(folder.path / 'index.html')}")
    return 1 if failed or faults else 0


def _say_what_ran(folder: Path) -> None:
    """Print what the results of a folder are results of, where that is not the model they are named after."""
    from lib.report.records import stand_in

    if about := stand_in.of_folder(folder):
        print(about)


def _shown(path: Path) -> Path:
    with contextlib.suppress(ValueError):
        return path.relative_to(Path.cwd())
    return path


def report(out: Path) -> int:
    """Render the pages of every record again, and the index; return the exit code. Runs no notebook."""
    from lib.suite.store import render

    if not result_folder.present(Folder(out)):
        raise UserError(f"{_shown(out)}: holds no record; build first: python build.py")
    folder = result_folder.open_folder(out)
    with _locked(folder):
        try:
            faults = render.render_all(folder, lambda line: print(line, flush=True)) + site.finish(folder, None)
        except OSError as error:
            raise UserError(f"{error.filename or folder.path}: cannot be written ({error.strerror})") from None
    _say_what_ran(folder.path)
    print(f"{len(faults)} failed; {_shown(folder.path / 'index.html')}")
    return 1 if faults else 0


def cover(out: Path) -> int:
    """Write the coverage report; return the exit code. Runs nothing."""
    folder = result_folder.open_folder(out)
    with _locked(folder):
        try:
            faults = site.finish(folder, "coverage")
        except OSError as error:
            raise UserError(f"{error.filename or folder.path}: cannot be written ({error.strerror})") from None
    for fault in faults:
        print(f"FAILED {fault}")
    _say_what_ran(folder.path)
    print(_shown(folder.path / file_names.FILES["coverage"][0]))
    return 1 if faults else 0


def show(request: Request, out: Path) -> int:
    """Print models, optimizations and the state of every job with the reason; return the exit code.

    What is wrong with a model's file is named, after the others: 2 then.
    """
    planned, faults = plan.plan_each(request)
    surveyed = survey(Folder(out), planned)
    print("models:")
    known = [*plan.models(), *parameter_files.registered()]
    width = max(map(len, known), default=0)
    for name, scales in parameter_files.takes_part(known).items():
        print(f"  {name:{width}}  {' '.join(scales)}".rstrip())
    print("optimizations: " + "  ".join(plan.optimizations()))
    print(f"results:       {_shown(out)}")
    _say_what_ran(out)
    width = max((len(job.stem) for job, _, _ in surveyed), default=0)
    for job, _, state in surveyed:
        word = state.status if state.kind in ("finished", "unrendered") else state.kind
        print(f"  {word:14}  {job.stem:{width}}  {state.why}".rstrip())
    for fault in faults:
        print(f"build.py: {fault}", file=sys.stderr)
    return 2 if faults else 0
