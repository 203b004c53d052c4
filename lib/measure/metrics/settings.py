"""How much measuring a run does: three named efforts, nothing else. `quick` shows that everything works and finds large
effects; `standard` finds a 5 % difference at a paired spread of 3 %; `thorough` is for figures one wants to publish.
"""

from dataclasses import dataclass, replace

from lib.errors import UserError, suggest


@dataclass(frozen=True)
class Effort:
    """Sizes of one run. `blocks`: timed AB/BA blocks. `items`: classified items. `windows` × `window_tokens`: held-out
    text.

    `prompt_tokens`, `new_tokens`, `batch`: the timed workloads. `retrieval_prompts`: generated answers at
    `retrieval_distance` tokens; 149 without a flip are the fewest that can show a loss of less than 2 points.
    `calibration_sequences` × `calibration_tokens`: what an optimization may look at. `resamples`: bootstrap resamples.
    """

    blocks: int
    items: int
    windows: int
    window_tokens: int
    prompt_tokens: int
    new_tokens: int
    batch: int
    retrieval_prompts: int
    retrieval_distance: int
    calibration_sequences: int
    calibration_tokens: int
    resamples: int


EFFORTS: dict[str, Effort] = {
    "quick": Effort(6, 48, 8, 256, 256, 16, 8, 16, 256, 16, 256, 2000),
    "standard": Effort(12, 400, 32, 256, 512, 16, 8, 160, 256, 64, 256, 4000),
    "thorough": Effort(30, 1200, 128, 256, 1024, 64, 16, 256, 256, 128, 256, 10000),
}

ON_A_SLICE = {"prompt_tokens": 256, "new_tokens": 2, "batch": 4, "calibration_sequences": 8}


def read(name: str, scale: str = "proxy") -> Effort:
    """Return the effort called `name` at a scale; raises UserError, with the nearest valid name, where there is none.

    On a slice one step of decoding takes as long as many of a stand-in, and weights are random: fewer steps, smaller
    batches, a shorter prompt and less calibration text tell as much.
    """
    if name not in EFFORTS:
        valid = ", ".join(EFFORTS)
        raise UserError(f'unknown effort "{name}": expected one of {valid}.{suggest(name, EFFORTS)}')
    return replace(EFFORTS[name], **ON_A_SLICE) if scale == "slice" else EFFORTS[name]
