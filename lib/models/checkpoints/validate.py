"""Do the tensors of a checkpoint folder fit its architecture? Answered from names and shapes; no weight is read.

Every stored tensor is handed to transformers without its bytes (on the device `meta`), so that its own renaming and
stacking decides what fits. Whether files are whole is `folder.py`'s to say. Planning does not import torch and asks a
process of its own: `python -m lib.models.checkpoints.validate FOLDER …` prints the fault of each folder, one line each,
and exits with 1 where there is one.
"""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from lib.errors import UserError
from lib.models.checkpoints.folder import MANIFEST, tensor_places
from lib.models.parameters import ROOT

TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
PICTURES = "preprocessor_config.json"
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")


def check(folders: Iterable[Path | str]) -> None:
    """Raise UserError with the first fault of these folders, found in a process of its own."""
    told = [str(folder) for folder in folders]
    ended = subprocess.run(
        [sys.executable, "-m", "lib.models.checkpoints.validate", *told],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        lines = ended.stdout.strip().splitlines() or ended.stderr.strip().splitlines() or ["the check itself failed"]
        raise UserError(lines[0])


def fault(folder: Path | str) -> str | None:
    """Return None, or in one line which tensor is missing or of another shape than the architecture's.

    What a checkpoint holds besides (layers that predict further tokens) is not asked for, and no fault.
    """
    import torch
    from transformers import AutoConfig

    from lib.models.checkpoints.weight_file import DTYPES
    from lib.models.structure.architecture import auto_class

    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return None  # saved by this workbench, with shapes of its own
    places = tensor_places(folder)
    shapes = {name: tuple(place[4]) for name, place in places.items()}
    if odd := odd_expert(shapes):
        return f"{folder}: {odd}"
    stored = {
        name: torch.empty(place[4], dtype=DTYPES.get(place[3], torch.bfloat16), device="meta")
        for name, place in places.items()
    }
    configuration = AutoConfig.from_pretrained(folder)
    made = auto_class(configuration)._model_mapping[type(configuration)]
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": {"": "meta"}}
    try:
        _, report = made.from_pretrained(None, config=configuration, state_dict=stored, **options)
    except (RuntimeError, ValueError) as error:
        return f"{folder}: its tensors do not fit {configuration.model_type} ({' '.join(str(error).split())[:160]})"
    for name, found, expected in sorted(report["mismatched_keys"]):
        return f"{folder}: {name} has the shape {tuple(found)}, expected {tuple(expected)} by config.json"
    for name in sorted(report["missing_keys"]):
        return f"{folder}: the checkpoint lacks {name}, which config.json asks for"
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return f"{folder}: holds no tokenizer; expected one of {', '.join(TOKENIZERS)}"
    if hasattr(configuration, "vision_config") and not (folder / PICTURES).is_file():
        return f"{folder}: holds no {PICTURES}, which says how pictures are prepared"
    return None


def odd_expert(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return None, or which tensor of an expert stored by itself differs from its siblings or is missing."""
    groups: dict[tuple[str, str], dict[int, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := EXPERT.fullmatch(name):
            groups.setdefault((match[1], match[3]), {})[int(match[2])] = shape
    for (before, after), by_expert in groups.items():
        usual = Counter(by_expert.values()).most_common(1)[0][0]
        count = max(max(found) for (where, _), found in groups.items() if where == before) + 1
        for expert in range(count):
            if expert not in by_expert:
                return f"the checkpoint lacks {before}.{expert}.{after}; the other experts have theirs"
            if by_expert[expert] != usual:
                return f"{before}.{expert}.{after} has the shape {by_expert[expert]}, the other experts' is {usual}"
    return None


def main(folders: list[str]) -> int:
    """Print the fault of every folder; return 1 if there is one."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.CRITICAL)
    faults = [found for folder in folders if (found := fault(folder))]
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
