"""Arms as processes: the peer's in an environment where it runs, the workbench's own beside it, in turns.

The order is reversed from turn to turn, so that of any two arms each comes first equally often. Does not interpret the
numbers.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.peers import environments
from tests.peers.comparisons import Arm, Comparison, ways
from tests.peers.environments import Impossible, Way

ROOT = Path(__file__).resolve().parents[2]
ARMS = Path(__file__).resolve().parent / "arms"
SECONDS = 5400  # limit for one arm


@dataclass(frozen=True)
class Result:
    """One arm's result of one turn: a number per metric, the package versions, a note; or the reason why there is
    none.
    """

    arm: Arm
    turn: int
    values: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    reason: str | None = None


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes: the setting, the environments' folder, and the folder of results and logs.

    `resumed`: the setting is that of an interrupted run, and the results of its arms are kept.
    """

    setting: Path
    environments: Path
    results: Path
    threads: int
    resumed: bool = False


Tell = Callable[[str], None]
RunArm = Callable[[Arm, int, Path, Places], Result]
Make = Callable[[Path, str, Way], Path]


def run_arm(arm: Arm, turn: int, interpreter: Path, places: Places) -> Result:
    """Run an arm in a fresh process and return its result, or the existing one.

    Raises Impossible if it ends without a result.
    """
    # A peer's result belongs to its environment: another way to install it may not run at all.
    where = [interpreter.parent.parent.name] if arm.own else []
    stem = "-".join([arm.script, *(option.replace("=", "-") for option in arm.options), *where, str(turn)])
    written, log = places.results / f"{stem}.json", places.results / f"{stem}.log"
    if places.resumed and written.is_file():
        return read(arm, turn, written, log)
    written.unlink(missing_ok=True)
    command = [str(interpreter), str(ARMS / f"{arm.script}.py"), str(places.setting), str(written), *arm.arguments]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"OMP_NUM_THREADS": str(places.threads), "MKL_NUM_THREADS": str(places.threads)}
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not arm.own:
        variables["PYTHONPATH"] = str(ROOT)
    with log.open("w", encoding="utf-8") as output:
        try:
            ended = subprocess.run(
                command, stdout=output, stderr=output, env=variables, cwd=places.results, timeout=SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Impossible(f"{arm.title}: {type(error).__name__}") from None
    return read(arm, turn, written, log, ended.returncode)


def read(arm: Arm, turn: int, written: Path, log: Path, code: int = 0) -> Result:
    """Return the result that an arm has written. Raises Impossible if it is missing or invalid."""
    try:
        content = json.loads(written.read_text(encoding="utf-8"))
        values = {name: float(value) for name, value in content["values"].items()}
        return Result(arm, turn, values, dict(content["versions"]), str(content.get("note", "")))
    except FileNotFoundError:
        why = environments.reason(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else "no log"
        raise Impossible(f"does not run ({code}): {why}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Impossible(f"wrote no result that can be read ({type(error).__name__})") from None


def in_turns(
    comparison: Comparison,
    places: Places,
    turns: int,
    known: dict[str, Way],
    tell: Tell = lambda _: None,
    run: RunArm = run_arm,
    make: Make = environments.ensure,
) -> list[Result]:
    """Return the results of all arms in all turns; an arm that does not run gives one result with the reason.

    If the peer cannot be installed or run in any way, that is the only result, as there is nothing to compare with.
    `known` remembers the way that worked, per peer.
    """
    peer = comparison.arms[0]
    try:
        first, interpreter = _first(comparison, places, known, tell, run, make)
    except Impossible as error:
        return [Result(peer, 0, reason=str(error))]
    results = [first]
    failed: set[Arm] = set()
    for turn in range(1 if comparison.once else turns):
        for arm in comparison.arms if turn % 2 == 0 else comparison.arms[::-1]:
            if (arm is peer and turn == 0) or arm in failed:
                continue
            start = time.monotonic()
            try:
                results.append(run(arm, turn, interpreter if arm.own else Path(sys.executable), places))
                tell(f"{arm.title}, turn {turn + 1}: {time.monotonic() - start:.0f} s")
            except Impossible as error:
                failed.add(arm)
                results.append(Result(arm, turn, reason=str(error)))
                tell(f"{arm.title}: {error}")
    return results


def _first(
    comparison: Comparison, places: Places, known: dict[str, Way], tell: Tell, run: RunArm, make: Make
) -> tuple[Result, Path]:
    """Return the peer's result in the first turn, and the interpreter of the environment in which it runs.

    Raises Impossible with a reason for each way that was tried.
    """
    peer, reasons = comparison.arms[0], []
    for way in (known[comparison.peer],) if comparison.peer in known else ways(comparison.peer):
        wanted = ", ".join([*way.requirements, *(f"{name} against its pins" for name in way.bare)])
        tell(f"{comparison.peer}: {wanted}")
        try:
            interpreter = make(places.environments, comparison.peer, way)
            start = time.monotonic()
            result = run(peer, 0, interpreter, places)
        except Impossible as error:
            reasons.append(f"with {wanted}: {error}")
            tell(f"{comparison.peer}: {error}")
            continue
        tell(f"{peer.title}, turn 1: {time.monotonic() - start:.0f} s")
        known[comparison.peer] = way
        return result, interpreter
    raise Impossible("; ".join(reasons))
