"""A complete build: plan, keys, runs, pages, overview and index. Knows no command line.

Returns the exit code: 0 if every run succeeded, 1 if one failed, 128 plus the signal's number if the build was stopped
(130 for Ctrl-C). A wrong request raises UserError before anything runs.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from lib.errors import ClusterLost, UserError
from lib.files import Held, locked
from lib.models import parameters
from lib.report.pages.suites import file_names
from lib.report.text import commands
from lib.suite.plan import cache_key, dependencies, plan
from lib.suite.plan.plan import Job, Request
from lib.suite.run import cpu_affinity, fork_server, kernel_process
from lib.suite.run.progress import Progress, duration
from lib.suite.run.stop import BuildStopped, stoppable
from lib.suite.store import build_history, result_folder, running, site
from lib.suite.store.result_folder import Folder, State

MOST_SUMMARIZED = 4  # a build of at most this many runs prints their verdicts
REFRESH_SECONDS = 120.0  # maximum age of the index while the runs of a first pass are replaced


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
    """Run all unfinished jobs, write the pages, the index and the files of `suite`; return the exit code.

    `force` repeats all runs, `again_if_busy` those measured on a busy machine. `cluster` is the address of a Dask
    scheduler whose workers run the jobs (None: this machine does). The suite `complete` at effort standard starts with
    a first pass at effort preview over jobs without a result, so that the site is complete early.
    """
    if jobs is not None and jobs > 1 and request.device != "cpu":
        raise UserError(f"--jobs {jobs}: expected 1 with --device {request.device}: two runs would share it")
    if jobs is not None:
        cpu_affinity.share_out(jobs)  # raises where there are too few cores
    for kind in ("cell", "run"):
        kernel_process.limit(kind, request.effort)  # an invalid environment variable is a wrong request
    result_folder.require_place(out)
    planned = plan.plan(request, here=cluster is None)  # may fetch files, so it follows the checks that need none
    largest = plan.largest_checkpoint(request)
    shares = cpu_affinity.share_out(jobs or cpu_affinity.default_jobs(request.scale, request.device, largest))
    first_pass = suite == "complete" and request.effort == "standard"
    again = "with --force the same command runs all of them again" if force else "the same command resumes"
    folder = result_folder.open_folder(out)
    try:
        with _locked(folder), stoppable():
            busy = set(_busy(folder, [job.stem for job in planned])) if again_if_busy else set()
            return _build(folder, planned, shares, force, suite, cluster, busy, first_pass)
    except BuildStopped as stopped:
        _show_what_is_there(folder)
        print(f"\nbuild.py: stopped; finished runs are kept, and {again}")
        return stopped.exit_code
    except ClusterLost as lost:
        _show_what_is_there(folder)
        print(f"build.py: {lost}; finished runs are kept, and {again}")
        return 1
    except OSError as error:
        where = error.filename or folder.path
        print(f"build.py: {where}: cannot be written ({error.strerror or error}); stopped, finished runs are kept")
        return 1


def _show_what_is_there(folder: Folder) -> None:
    """Write the index of a build that was stopped, so that it shows the finished runs."""
    if result_folder.present(folder):
        site.refresh_index(folder)


@contextlib.contextmanager
def _locked(folder: Folder) -> Iterator[None]:
    """Hold the folder's lock inside the block. Raises UserError where another build holds it."""
    try:
        with locked(folder.lock):
            yield
    except Held as holder:
        raise UserError(
            f"{folder.path}: another build is running there ({holder}); wait for it or give another folder with --out"
        ) from None


def _build(
    folder: Folder,
    planned: Sequence[Job],
    shares: Sequence[Sequence[int]],
    force: bool,
    suite: str | None,
    cluster: str | None,
    busy: Collection[str],
    first_pass: bool,
) -> int:
    surveyed = survey(folder, planned)
    running.tidy(folder)
    to_run = [(job, parts) for job, parts, state in surveyed if force or state.must_run or job.stem in busy]
    to_render = [job.stem for job, _, state in surveyed if not force and state.kind == "unrendered"]
    for job, _, state in surveyed:
        if state.kind == "damaged":
            print(f"build.py: {state.why}: running {job.stem} again")
    finished = len(planned) - len(to_run)
    if finished:
        print(f"{finished} of {len(planned)} runs are already finished and kept")
    with _fork_server([job for job, _ in to_run] if cluster is None else [], shares) as server:
        began = first_pass and _first_pass(folder, surveyed, shares, cluster, server)
        refresh = REFRESH_SECONDS if began else None
        expected = _expected(surveyed)
        results = _run(folder, to_run, shares, planned, expected, cluster, server, refresh) if to_run else []
        if results and (again := _outdated(folder, surveyed)):
            results += _run(folder, again, shares, planned, expected, cluster, server, refresh)
        if cluster is not None and commands.out_of(folder.path):  # workers do not know the final folder of their pages
            to_render += [result.stem for result in results]
        faults = _render(folder, [*dict.fromkeys(to_render)], planned)
        faults += build_history.keep(folder, suite or "run")
        faults += _overview(folder, shares, server)
    faults += site.finish(folder, suite)
    short = site.short_of_curves(folder) if suite == "enhanced" else []
    for line in short:
        print(f"SHORT {line}")
    for stem, reason in _busy(folder, [job.stem for job in planned]).items():
        print(f"BUSY {stem}: {reason}")
    return _summary(folder, [job.stem for job in planned], results, faults) or int(bool(short))


def _outdated(folder: Folder, surveyed: Sequence[tuple[Job, dict, State]]) -> list[tuple[Job, dict]]:
    """Return the jobs that read a file, such as a recipe, which a run of this build has rewritten; print their names.
    Files that these jobs rewrite in turn are left to the next build.
    """
    changes = {job.stem: result_folder.changed_inputs(folder, job.stem) for job, _, _ in surveyed}
    for stem, changed in changes.items():
        if changed:
            print(f"{stem}: {changed} during this build; it is run again", flush=True)
    return [(job, parts) for job, parts, _ in surveyed if changes[job.stem]]


def _expected(surveyed: Sequence[tuple[Job, dict, State]]) -> dict[str, float]:
    """Return stem → seconds of the job's previous run at the same effort, where known."""
    return {job.stem: state.seconds for job, _, state in surveyed if state.seconds and state.effort == job.effort}


@contextlib.contextmanager
def _fork_server(jobs: Sequence[Job], shares: Sequence[Sequence[int]]) -> Iterator[fork_server.ForkServer | None]:
    """Yield the server that forks the processes of jobs on this machine's CPU; None where a job needs a GPU or there is
    no job.
    """
    if not jobs or any(job.parameters.get("device", "cpu") != "cpu" for job in jobs):
        yield None
        return
    architectures = set()
    for model in {job.model for job in jobs}:
        with contextlib.suppress(UserError):  # reported by the model's own run
            architectures.add(parameters.read(model).architecture)
    with kernel_process.fork_server(len(shares[0]), sorted(architectures - {""})) as server:
        yield server


def _first_pass(
    folder: Folder,
    surveyed: Sequence[tuple[Job, dict, State]],
    shares: Sequence[Sequence[int]],
    cluster: str | None,
    server: fork_server.ForkServer | None,
) -> bool:
    """Run at effort preview all jobs without a result, or with that of a preview, and write the whole site; return
    whether there was such a job.

    Stale or failed runs at other efforts stay on the site until they run again. The records of this pass name their
    effort and have keys of their own: they do not count as finished in the main pass, which replaces them, and are not
    stored in the history.
    """
    lacking = [
        plan.at_effort(job, plan.FIRST_PASS)
        for job, _, state in surveyed
        if state.must_run and (state.kind in ("missing", "damaged") or state.effort == plan.FIRST_PASS)
    ]
    if not lacking:
        return False
    previews = survey(folder, lacking)
    to_run = [(job, parts) for job, parts, state in previews if state.must_run]
    planned = [job for job, _, _ in surveyed]
    effort = planned[0].effort
    if to_run:
        print(f"first pass: {len(to_run)} runs at effort {plan.FIRST_PASS}; those at effort {effort} replace them")
        _run(folder, to_run, shares, planned, _expected(previews), cluster, server)
    faults = _render(folder, [job.stem for job, _, state in previews if state.kind == "unrendered"], planned)
    faults += _overview(folder, shares, server) + site.finish(folder, "complete")
    for fault in faults:
        print(f"FAILED {fault}")
    index = shown(folder.path / "index.html")
    print(f"first pass complete: {index}; Ctrl-C keeps it, effort {effort} follows", flush=True)
    return True


def _pool_process_variance(folder: Folder, effort: str) -> None:
    """Publish to the runs the variance between processes that earlier runs showed on this machine."""
    from lib.report.analysis.noise import process_draws

    with contextlib.suppress(UserError):  # a history that cannot be read is reported when the build ends
        process_draws.publish(folder.path, build_history.store_of(folder.path), effort)


def _run(
    folder: Folder,
    to_run: list,
    shares: Sequence,
    planned: Sequence[Job],
    expected: dict,
    address: str | None,
    server: fork_server.ForkServer | None,
    refresh_seconds: float | None = None,
) -> list:
    from lib.suite.run import schedule

    _pool_process_variance(folder, to_run[0][0].effort)
    neighbours = sorted({*result_folder.present(folder), *((job.optimization, job.model) for job in planned)})
    entries = [schedule.Entry(job, cache_key.of(parts), parts) for job, parts in to_run]
    with (
        running.named(folder),
        running.temporary(folder) as temporary,
        Progress([job.stem for job, _ in to_run], len(shares), expected) as progress,
    ):
        shared = schedule.BuildContext(
            folder, shares, temporary, neighbours, progress, refresh_seconds=refresh_seconds, server=server
        )
        if address:
            from lib.suite.cluster import dask

            return dask.run(shared, entries, address)
        return schedule.run(shared, entries)


def _render(folder: Folder, stems: Sequence[str], planned: Sequence[Job]) -> list[str]:
    if not stems:
        return []
    from lib.suite.store import render

    neighbours = sorted({*result_folder.present(folder), *((job.optimization, job.model) for job in planned)})
    return [fault for stem in stems if (fault := render.render(folder.path, stem, neighbours))]


def _overview(folder: Folder, shares: Sequence[Sequence[int]], server: fork_server.ForkServer | None) -> list[str]:
    """Execute `overview.ipynb` over the records, after all runs, unless it is up to date; return the faults."""
    path = plan.NOTEBOOKS / f"{plan.OVERVIEW}.ipynb"
    if not path.is_file():
        return []
    from lib.suite.run import overview

    if overview.up_to_date(folder, path):
        return []
    with running.temporary(folder) as temporary:
        fault = overview.execute(folder, path, shares[0], temporary, server)  # needs little: one share is enough
    return [fault] if fault else []


def _busy(folder: Folder, stems: Sequence[str]) -> dict[str, str]:
    """Return stem → why timings are not judged, for the runs that were measured on a busy machine."""
    from lib.report.analysis.noise import busy_runs

    reasons = busy_runs.reasons(folder.path, stems)
    return {stem: f"{reason} (--busy runs it again)" for stem, reason in reasons.items()}


def _summary(folder: Folder, stems: Sequence[str], results: Sequence, faults: Sequence[str]) -> int:
    """Print the final lines: failures, the verdicts of a small build, the index; return the exit code."""
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        print(f"FAILED {result.stem}: {result.reason}" + (f" (notebook: {result.notebook})" if result.notebook else ""))
    for fault in faults:
        print(f"FAILED {fault}")
    print_stand_in_note(folder.path)
    if len(stems) <= MOST_SUMMARIZED:
        from lib.suite.store import terminal_summary

        for line in (line for stem in stems for line in terminal_summary.lines(folder, stem, shown)):
            print(line)
    took, total = sum(result.seconds for result in results), len(stems)
    ran = f"{len(results)} run ({duration(took)} of work)" if results else "nothing had to be run"
    ended = f"{total - len(failed)} of {total} finished, {len(failed)} failed"
    print(f"{ended}; {ran}; {shown(folder.path / 'index.html')}")
    return 1 if failed or faults else 0


def print_stand_in_note(folder: Path) -> None:
    """Print the notice on proxy models and slices for the results in `folder`; nothing for real models."""
    from lib.report.records.setting import stand_in

    if about := stand_in.of_folder(folder):
        print(about)


def shown(path: Path) -> Path:
    """Return `path` relative to the working directory if it lies inside it, else unchanged."""
    with contextlib.suppress(ValueError, OSError):
        return path.relative_to(Path.cwd())
    return path


def report(out: Path) -> int:
    """Render the pages of every record and the index again; return the exit code. Runs no notebook."""
    from lib.suite.store import render

    result_folder.require_records(out)
    folder = result_folder.open_folder(out)
    with _locked(folder):
        try:
            faults = render.render_all(folder, lambda line: print(line, flush=True))
            of_the_set = site.finish(folder, None)
        except OSError as error:
            raise UserError(f"{error.filename or folder.path}: cannot be written ({error.strerror or error})") from None
    for fault in of_the_set:
        print(f"FAILED {fault}")
    print_stand_in_note(folder.path)
    print(f"{len(faults) + len(of_the_set)} failed; {shown(folder.path / 'index.html')}")
    return 1 if faults or of_the_set else 0


def write_coverage(out: Path) -> int:
    """Write the coverage report; return the exit code. Runs nothing. Raises UserError where there is no record."""
    result_folder.require_records(out)
    folder = result_folder.open_folder(out)
    with _locked(folder):
        try:
            faults = site.finish(folder, "coverage")
        except OSError as error:
            raise UserError(f"{error.filename or folder.path}: cannot be written ({error.strerror or error})") from None
    for fault in faults:
        print(f"FAILED {fault}")
    print_stand_in_note(folder.path)
    print(shown(folder.path / file_names.FILES["coverage"][0]))
    return 1 if faults else 0
