"""Peers on the same file, in one run: `python tests/peers/run.py [PEER …] --out DIR`.

Each peer runs in its own environment, made once outside the tree, with the same checkpoint, prompt, windows,
calibration text and threads as the workbench. Writes `peers.md`, `peers.json` and the arms' own results and logs into
DIR; the same command resumes an interrupted run, another DIR starts a new one. A peer that cannot be installed or does
not run gets a table row with the reason. Times are meaningful only on a quiet machine.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.errors import UserError, suggest  # noqa: E402
from lib.files import cache_folder, write_atomically  # noqa: E402
from lib.measure.timing import disturbance  # noqa: E402
from lib.measure.trackers import energy_source  # noqa: E402
from lib.suite.plan import plan  # noqa: E402
from tests.peers import running, table  # noqa: E402
from tests.peers.comparisons import COMPARISONS, Comparison  # noqa: E402
from tests.peers.environments import Way  # noqa: E402
from tests.peers.running import Places, Result  # noqa: E402

PEERS = tuple(dict.fromkeys(comparison.peer for comparison in COMPARISONS))
NOT_SHARED = ("peers", "out", "environments", "note", "turns")  # a run with more turns continues one with fewer
IDS = ("prompt", "windows", "calibration")  # parts of the setting that are too long to show


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    argument_parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=f"Peers: {', '.join(PEERS)}.")
    argument_parser.add_argument("peers", nargs="*", metavar="PEER", help="default: all")
    argument_parser.add_argument(
        "--out", type=Path, required=True, help="folder of the table, the results and the logs"
    )
    argument_parser.add_argument("--model", default="smollm2-135m-instruct", help="by name or by its checkpoint")
    argument_parser.add_argument(
        "--environments", type=Path, default=cache_folder() / "peers", help="where environments are kept"
    )
    argument_parser.add_argument("--threads", type=int, default=len(disturbance.cores()))
    argument_parser.add_argument(
        "--dtype", default="", help="of every arm but llama.cpp's; default: the workbench's choice here"
    )
    argument_parser.add_argument(
        "--turns", type=int, default=4, help="processes of each arm whose speed is read; even, to be fair"
    )
    argument_parser.add_argument(
        "--rounds", type=int, default=5, help="timed calls in each process, whose median counts"
    )
    argument_parser.add_argument("--prompt-tokens", type=int, default=512)
    argument_parser.add_argument("--new-tokens", type=int, default=64)
    argument_parser.add_argument("--windows", type=int, default=32, help="of held-out text, for perplexity")
    argument_parser.add_argument(
        "--window-tokens", type=int, default=512, help="of a window and of a calibration sequence"
    )
    argument_parser.add_argument("--sequences", type=int, default=64, help="of calibration text")
    argument_parser.add_argument("--sparsity", type=float, default=0.5)
    argument_parser.add_argument("--channels", type=float, default=0.25, help="share of feed-forward channels removed")
    argument_parser.add_argument("--note", default="", help="a remark on this run, for the table")
    return argument_parser


def chosen(peers: list[str]) -> list[Comparison]:
    """Return the comparisons of the given peers, or all if none is given. Raises UserError for an unknown one."""
    for peer in peers:
        if peer not in PEERS:
            raise UserError(f'unknown peer "{peer}".{suggest(peer, PEERS)} Known: {", ".join(PEERS)}')
    return [comparison for comparison in COMPARISONS if not peers or comparison.peer in peers]


def make_setting(options: argparse.Namespace, out: Path) -> tuple[Path, bool]:
    """Write what all arms share to a file; return it, and whether it already existed with the same choices.

    Raises UserError if the model cannot be loaded.
    """
    choices = {name: value for name, value in vars(options).items() if name not in NOT_SHARED}
    choices["model"] = plan.model_named(options.model)
    choices_file, setting, text = out / "choices.json", out / "setting.json", json.dumps(choices)
    if setting.is_file() and choices_file.is_file() and choices_file.read_text(encoding="utf-8") == text:
        return setting, True
    setting.unlink(missing_ok=True)
    for stale in (out / "arms").glob("*.json"):  # of other choices
        stale.unlink()
    write_atomically(choices_file, text)
    command = [sys.executable, "-m", "tests.peers.setting", str(choices_file), str(setting)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode or not setting.is_file():
        lines = ended.stderr.strip().splitlines() or ["it gives no reason"]
        raise UserError(f"{options.model}: no setting could be made of it: {lines[-1][:200]}")
    return setting, False


def facts(setting: dict[str, Any], results: list[Result], load: list[str], note: str) -> dict[str, str]:
    """Return the facts shown above the table: when, where, with what."""
    shown = {name: value for name, value in setting.items() if name not in (*IDS, "folder", "gguf")}
    shown |= {name: len(setting[name]) for name in ("windows", "calibration")}
    digest = hashlib.sha256(json.dumps([setting[name] for name in IDS]).encode()).hexdigest()[:12]
    versions = sorted({f"{name} {release}" for result in results for name, release in result.versions.items()})
    about_run = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{energy_source.cpu_name() or platform.machine()}, cores given: {len(disturbance.cores())}",
        "load (one minute) before and after": ", ".join(load),
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
        "setting": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items()),
        "token ids of prompt, windows and calibration": digest,
    }
    return about_run | ({"note": note} if note else {})


def load_now() -> str:
    """Return the load average of the last minute, or "unknown"."""
    try:
        return f"{os.getloadavg()[0]:.2f}"
    except (OSError, AttributeError):
        return "unknown"


def main(arguments: list[str]) -> int:
    """Run the comparisons and write the table; return the exit code: 1 if a peer gave no result."""
    options = parser().parse_args(arguments)
    comparisons = chosen(options.peers)
    out = options.out.absolute()
    (out / "arms").mkdir(parents=True, exist_ok=True)
    load, rows, results = [load_now()], [], []
    setting, resumed = make_setting(options, out)
    places = Places(setting, options.environments.absolute(), out / "arms", options.threads, resumed)
    known: dict[str, Way] = {}
    for comparison in comparisons:
        of_this = running.in_turns(comparison, places, options.turns, known, tell=lambda line: print(line, flush=True))
        results += of_this
        rows += table.rows(comparison, of_this)
        _write(out, json.loads(setting.read_text(encoding="utf-8")), rows, results, [*load, load_now()], options.note)
    print((out / "peers.md").read_text(encoding="utf-8"))
    return 1 if any(row.reason for row in rows) else 0


def _write(
    out: Path, setting: dict[str, Any], rows: list[table.Row], results: list[Result], load: list[str], note: str
) -> None:
    """Write the table of the results so far, so that an interrupted run keeps them."""
    about = facts(setting, results, load, note)
    notes = [f"{result.arm.title}: {result.note}" for result in results if result.note]
    write_atomically(out / "peers.md", table.markdown(rows, about, notes))
    arms = [
        {"arm": r.arm.title, "turn": r.turn, "values": dict(r.values), "versions": dict(r.versions), "reason": r.reason}
        for r in results
    ]
    content = {"facts": about, "rows": table.plain(rows), "arms": arms}
    write_atomically(out / "peers.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"peers: {error}", file=sys.stderr)
        sys.exit(2)
