"""Checks that the tensors of a checkpoint folder fit its architecture, by name and shape, and that its tokenizer fits.

Reads no weights. Every stored tensor is passed to transformers without its bytes (on the device `meta`), so that the
renaming and stacking of transformers decides what fits. `folder.py` checks that files are complete. Planning does not
import torch and runs the check as a process: `python -m lib.models.checkpoints.validate FOLDER …` prints one line per
faulty folder and exits with 1 if there is any; `--described SCALE MODEL …` does so for models that cannot be built.
"""

import contextlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lib.errors import UserError, suggest
from lib.files import json_object
from lib.models import parameters
from lib.models.checkpoints.folder import MANIFEST, tensor_places
from lib.models.parameters import ROOT
from lib.models.sources import program
from lib.models.structure.supported import SUPPORTED

DESCRIBED = "--described"
NO_TEXT = "transformers has no model of it that generates text"
GENERATION = "generation_config.json"
IMAGE_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# Sizes in which image processor and vision tower must agree: attribute of the processor → key of the tower.
SIZES = {"patch_size": "patch_size", "merge_size": "spatial_merge_size", "temporal_patch_size": "temporal_patch_size"}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")


def check(folders: Iterable[Path | str]) -> None:
    """Raise UserError with the first fault of the checkpoint `folders`, checked in a separate process."""
    if paths := [str(folder) for folder in folders]:
        _check(paths, f"{', '.join(paths)}: the tensors could not be checked")


def check_described(names: Iterable[str], scale: str) -> None:
    """Raise UserError if a model with random weights cannot be built from its parameter file, or is unsupported.

    Supported architectures are skipped, since the check takes seconds in a separate process.
    """
    unknown = [name for name in names if parameters.read(name).architecture not in SUPPORTED]
    if unknown:
        _check([DESCRIBED, scale, *unknown], f"{', '.join(unknown)}: could not be checked")


def _check(arguments: list[str], failure: str) -> None:
    """Run this module as a process; raise UserError with its first line, or with `failure` if it crashed."""
    command = [sys.executable, "-m", "lib.models.checkpoints.validate", *arguments]
    result = subprocess.run(command, cwd=ROOT, **program.options())
    if result.returncode:
        if lines := result.stdout.strip().splitlines():
            raise UserError(lines[0])
        why = (result.stderr.strip().splitlines() or [f"its process ended with {result.returncode}"])[-1][:200]
        raise UserError(f"{failure} ({why})")


def described_fault(name: str, scale: str) -> str | None:
    """Return None, or one line on why the parameter file `name` describes no model that can be built and used."""
    from lib.models.checkpoints import io
    from lib.models.structure.support import unsupported

    description = parameters.read(name)
    try:
        model = io.build(description.config(scale), description.architecture, device="meta")
    except Exception as error:  # a wrong value of the configuration may raise anything
        why = " ".join(str(error).split())[:160] or type(error).__name__
        hint = suggest(description.architecture, SUPPORTED) or f" Supported are {', '.join(SUPPORTED)}."
        return f'{name}: transformers cannot build a model of architecture "{description.architecture}" ({why}).{hint}'
    return f"{name}: {reason}" if (reason := unsupported(model)) else None


def fault(folder: Path | str) -> str | None:
    """Return None, or one line on the first tensor or file of a checkpoint folder that is missing or does not fit.

    Additional tensors, for example of layers for multi-token prediction, are allowed.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig

    from lib.models.checkpoints import io, quantization
    from lib.models.checkpoints.weight_file import DTYPES
    from lib.models.structure.architecture import auto_class
    from lib.models.structure.support import refusal, unsupported

    folder = Path(folder)
    places = tensor_places(folder)
    shapes = {name: tuple(place[4]) for name, place in places.items()}
    as_saved_here = (folder / MANIFEST).is_file()  # shapes may differ from the configuration
    if not as_saved_here and (odd := odd_expert(shapes)):
        return f"{folder}: {odd}"
    stored_as = {name: (place[3], shapes[name]) for name, place in places.items()}
    if not as_saved_here and (quantized := quantization.fault(folder, stored_as)):
        return quantized
    stored = {
        name: torch.empty(place[4], dtype=DTYPES.get(place[3], torch.bfloat16), device="meta")
        for name, place in places.items()
    }
    try:
        configuration = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if as_saved_here:
            if misfit := io.manifest_fault(folder, places):
                return f"{folder}: {misfit}"
            return _beside(folder, configuration)
        auto: Any = auto_class(configuration)
        try:
            model_class = auto._model_mapping[type(configuration)]
        except KeyError:
            return f"{folder}: {refusal(configuration.model_type, NO_TEXT)}"
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": {"": "meta"}}
        model, report = model_class.from_pretrained(None, config=configuration, state_dict=stored, **options)
    except Exception as error:  # a configuration may name anything: missing packages, kernels, classes
        why = " ".join(str(error).split())[:200] or type(error).__name__
        unknown = json_object(folder / "config.json").get("model_type") not in CONFIG_MAPPING
        among = f"; supported are {', '.join(SUPPORTED)}" if unknown else ""
        return f"{folder}: transformers cannot build its model ({why}){among}"
    if reason := unsupported(model):
        return f"{folder}: {reason}"
    for name, shape, expected in sorted(report["mismatched_keys"]):
        return f"{folder}: {name} has the shape {tuple(shape)}, but config.json implies {tuple(expected)}"
    for name in sorted(report["missing_keys"]):
        return f"{folder}: the checkpoint lacks {name}, which config.json requires"
    return _beside(folder, configuration)


def _beside(folder: Path, configuration: Any) -> str | None:
    """Return None, or one line on what is wrong with the generation settings, the image processor or the tokenizer."""
    from transformers import GenerationConfig

    from lib.models.checkpoints import io, tokenizer_check

    if (folder / GENERATION).is_file():
        try:
            GenerationConfig.from_pretrained(folder)
        except OSError:  # not JSON: transformers uses the settings of config.json instead
            pass
        except Exception as error:  # values that transformers refuses, or not a JSON object
            return f"{folder}: its {GENERATION} cannot be used ({' '.join(str(error).split())[:160]})"
    if vision := getattr(configuration, "vision_config", None):
        if not any((folder / name).is_file() for name in IMAGE_PROCESSORS):
            return f"{folder}: holds no {IMAGE_PROCESSORS[0]}, the configuration of the image processor"
        try:
            processor = io.load_image_processor(folder)
        except Exception as error:  # the exception of a damaged file depends on its parser
            return f"{folder}: its image processor cannot be read ({' '.join(str(error).split())[:160]})"
        for name, of_tower in SIZES.items():
            size, expected = getattr(processor, name, None), getattr(vision, of_tower, None)
            if None not in (size, expected) and size != expected:
                return f"{folder}: its image processor has the {name} {size}, its vision tower {expected} ({of_tower})"
    return tokenizer_check.fault(folder, configuration.get_text_config().vocab_size)


def odd_expert(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return None, or a message on an individually stored expert whose tensor is missing or differs in shape."""
    groups: dict[tuple[str, str], dict[int, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := EXPERT.fullmatch(name):
            groups.setdefault((match[1], match[3]), {})[int(match[2])] = shape
    for (before, after), by_expert in groups.items():
        usual = Counter(by_expert.values()).most_common(1)[0][0]
        count = max(max(indices) for (prefix, _), indices in groups.items() if prefix == before) + 1
        for expert in range(count):
            if expert not in by_expert:
                return f"the checkpoint lacks {before}.{expert}.{after}, which the other experts have"
            if by_expert[expert] != usual:
                return f"{before}.{expert}.{after} has the shape {by_expert[expert]}, that of other experts is {usual}"
    return None


def main(folders: list[str]) -> int:
    """Print the fault of every folder (after DESCRIBED and a scale, of every model); return 1 if there is any."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.CRITICAL)
    with contextlib.redirect_stdout(sys.stderr):  # keep what libraries print out of the list of faults
        if folders[:1] == [DESCRIBED]:
            lines = [described_fault(name, folders[1]) for name in folders[2:]]
        else:
            lines = [fault(folder) for folder in folders]
    faults = [line for line in lines if line]
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
