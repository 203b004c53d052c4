"""What all arms of a run share: checkpoint, prompt, windows, calibration text, threads; as one JSON file.

Runs in its own process, so that the process that starts the arms never loads torch: `python -m tests.peers.setting
CHOICES.json SETTING.json`. Contains nothing specific to a peer.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lib.models import loading
from lib.models import parameters as parameter_files
from lib.models.sources import fetch as sources
from lib.models.tasks import tasks
from lib.models.tasks.retrieval import text_windows


def build(choices: dict[str, Any]) -> dict[str, Any]:
    """Return the setting for the choices of `tests.peers.run`: token ids are lists, paths are text."""
    torch.set_num_threads(choices["threads"])
    loaded = loading.load(choices["model"], "full", dtype=choices["dtype"] or None)
    file = sources.gguf(parameter_files.read(choices["model"]).source)
    length = choices["window_tokens"]
    return choices | {
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "folder": str(loaded.folder),
        "gguf": str(file or ""),
        "gguf_bytes": 0 if file is None else weight_bytes(file),
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "prompt": text_windows(loaded, "search", 1, choices["prompt_tokens"])[0].tolist(),
        "windows": text_windows(loaded, "final", choices["windows"], length).tolist(),
        "calibration": [
            row
            for batch in tasks.calibration(loaded, choices["sequences"], length)
            for row in batch["input_ids"].tolist()
        ],
    }


def weight_bytes(file: Path) -> int:
    """Return the bytes of all tensors of a GGUF file, without its header and tokenizer."""
    from gguf import GGUFReader

    return int(sum(tensor.n_bytes for tensor in GGUFReader(file).tensors))


if __name__ == "__main__":
    chosen = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(build(chosen)), encoding="utf-8")
