"""Compares two sets of records where nothing may differ: scores, parameter counts, bytes and FLOPs.

    python tests/same_results.py OLD NEW

OLD and NEW are record files, or folders of them; the records may be of different schemas. What is timed, or read from a
process or a counter, is left out. Searches that are steered by measured times may choose differently in each run: such
records are listed separately. Exit code 1 if a number differs for no such reason.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lib.report.records import record  # noqa: E402
from lib.report.records.record import Record  # noqa: E402

COUNTED = {
    "parameters", "active_parameters", "weights_bytes", "kv_cache_bytes_per_token", "prefill_flops_per_token",
    "decode_flops_per_token", "decode_bytes_per_token", "full_depth_parameters", "full_depth_weights_bytes",
    "full_depth_kv_cache_bytes_per_token", "attention_density",
}  # fmt: skip
# Scores that depend on timing, not on the answers.
BY_THE_CLOCK = {
    "profile_disagreement", "quality_estimate_error", "false_rollback_share", "fault_detection_seconds",
}  # fmt: skip
# Workloads whose baseline is the fastest timed dense form: its dtype, so its bytes, may change.
FASTEST_BASELINE = {"feed-forward part"}
# Decided by the timings of this run: which model is judged, or when.
STEERED_BY_TIME = {
    "adaptive_batch_sizes", "automl_components", "continuous_nas", "feedback_mechanisms", "modular_components",
    "pre_vs_post_optimization",
}  # fmt: skip


def exact(records: Record) -> dict[tuple[str, str, str], tuple]:
    """Map arm, metric and workload to (baseline, optimized) for every number that two runs must share."""
    groups = [("arms", records.measurements), *((c.name, c.measurements) for c in records.controls)]
    return {
        (group, m.metric, m.workload): (None if m.workload in FASTEST_BASELINE else m.baseline, m.optimized)
        for group, measurements in groups
        for m in measurements
        if (m.dimension == "accuracy" and m.metric not in BY_THE_CLOCK) or m.metric in COUNTED
    }


def differences(old: Record, new: Record) -> list[str]:
    """Return one line per number that differs, is missing or is new."""
    before, after = exact(old), exact(new)
    lines = [f"{' '.join(key)}: missing" for key in before if key not in after]
    lines += [f"{' '.join(key)}: new" for key in after if key not in before]
    lines += [f"{' '.join(k)}: {before[k]} → {after[k]}" for k in before if k in after and before[k] != after[k]]
    return lines


def read(path: Path) -> dict[str, Record]:
    """Return stem → record of a file or a folder."""
    files = [path] if path.is_file() else sorted(path.glob("*--*.json"))
    return {file.name.removesuffix(".json"): record.read(file) for file in files}


def main(arguments: list[str]) -> int:
    """Print what differs between OLD and NEW; return the exit code."""
    if len(arguments) != 2:
        print(__doc__)
        return 2
    old, new = (read(Path(argument)) for argument in arguments)
    faults, steered, compared = 0, 0, 0
    for stem in sorted(old.keys() & new.keys()):
        lines = differences(old[stem], new[stem])
        compared += len(exact(old[stem]))
        if not lines:
            continue
        by_time = old[stem].optimization in STEERED_BY_TIME
        faults, steered = faults + (not by_time), steered + by_time
        print(f"{stem}: {len(lines)} differ{' (steered by measured times)' if by_time else ''}")
        print("".join(f"  {line}\n" for line in lines[:12]), end="")
    for name, alone in (("OLD", old.keys() - new.keys()), ("NEW", new.keys() - old.keys())):
        if alone:
            print(f"only in {name}: {', '.join(sorted(alone))}")
    print(
        f"{compared} numbers of {len(old.keys() & new.keys())} records compared: {faults} records differ, "
        f"{steered} more where measured times steer"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
