"""Optimize a checkpoint that does not fit into memory: block by block, from file to file.

It works for optimizations with a module `out_of_core`, which has `apply_to_file(source, target, calibration, …)`,
`options(parameters)` and, if the result may differ from that in memory, `remark(parameters)`. `parameters` are those of
a run.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.measure.metrics import settings
from lib.models.loading import Loaded
from lib.models.offload import streamer
from lib.models.tasks import tasks
from lib.optimizations.common import discovery
from lib.optimizations.common.compression import calibration_text
from lib.optimizations.modular_components import method as composing

OUT_OF_CORE = "out_of_core"


def is_streamed(loaded: Loaded) -> bool:
    """Return whether the weights of a model did not fit into memory when it was loaded."""
    return streamer.streamer(loaded.model) is not None


def is_able(stem: str, parameters: Mapping[str, Any]) -> bool:
    """Return whether an optimization with the parameters of a run works from file to file."""
    module = discovery.beside_method(stem, OUT_OF_CORE)
    if module is None:
        return False
    try:
        module.options(parameters)
    except UserError:  # needs the whole model in memory
        return False
    return True


def remark(stem: str, parameters: Mapping[str, Any]) -> str:
    """Return how the result differs from that of a run in memory; empty if it does not."""
    differs = getattr(discovery.beside_method(stem, OUT_OF_CORE), "remark", None)
    return differs(parameters) if differs else ""


def writer(loaded: Loaded, stem: str, parameters: Mapping[str, Any]) -> Callable[..., Path]:
    """Return a function that writes the checkpoint of `loaded`, changed by an optimization, to a folder `target` (and
    `shards`, see `rewriting.rewrite`). It no longer needs the streamed weights, which are closed.

    `parameters` are those of a run. Raises UserError for an optimization or a parameter that needs the whole model in
    memory; the returned function raises the errors of `apply_to_file`.
    """
    module = discovery.beside_method(stem, OUT_OF_CORE)
    if module is None:
        able = [other for other in composing.parts() if discovery.beside_method(other, OUT_OF_CORE) is not None]
        raise UserError(
            f"{stem}: needs the whole model in memory, and {loaded.name} does not fit; optimizations that work from "
            f"file to file: {', '.join(able)}"
        )
    options, size = module.options(parameters), settings.read(parameters["effort"], loaded.scale)
    count = calibration_text.sequences(loaded.model, size)
    text = tasks.calibration(loaded, count, size.calibration_tokens, int(parameters.get("seed", 0)))
    stream = streamer.streamer(loaded.model)
    assert stream is not None
    stream.close()
    return partial(module.apply_to_file, loaded.folder, calibration=text, device=loaded.device, **options)
