"""Prefix caching beside every policy: documents begin alike (instructions, examples), and the cache of that beginning
is kept and copied instead of read again (Zheng et al. 2024, SGLang, NeurIPS, section 3; also in vLLM).

It asks whether a batch size that follows traffic still gains something where an engine reads less. Lengths, rates and
traces stay as they are; only what is read changes. Rows here hold whole copies, so time is saved and no memory is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from lib.errors import UserError
from lib.measure.metrics.measurement import Measurement
from lib.measure.serving import engine as serving
from lib.measure.serving.engine import ModelEngine
from lib.measure.serving.policy_comparison import PolicyFactory
from lib.measure.serving.traffic import SPREAD, ServingRequest
from lib.models.decoding import batch_cache
from lib.models.loading import Loaded
from lib.optimizations.adaptive_batch_sizes import simulated
from lib.optimizations.adaptive_batch_sizes.simulated import Carry, Row
from lib.optimizations.adaptive_batch_sizes.study import ADAPTIVE, TrafficStudy

READ, KEPT = "read every time", "kept"
ROUNDS = 5  # of a document's prefill on the real model, with and without
TRAFFIC = "changing"


@dataclass(frozen=True)
class PrefixStudy:
    """The study in which the first `tokens` of documents are kept, its best fixed `size`, and `rows` of both studies.

    `shares`: seconds of one document's prefill, kept ÷ read, on the real model and in simulation.
    """

    kept: TrafficStudy
    tokens: int
    size: int
    rows: list[Row]
    shares: tuple[float, float]

    def table(self) -> pd.DataFrame:
        """Return the rows as a frame."""
        return pd.DataFrame(self.rows)

    @property
    def caption(self) -> str:
        """How much is shared, and what keeping it saves of one document's prefill, measured and simulated."""
        real, simulation = self.shares
        return (
            f"Changing trace, simulated; documents share {self.tokens} tokens. One document's prefill with them kept "
            f"takes {real:.2f} of the time on the real model, {simulation:.2f} in simulation."
        )

    def control(self, carry: Carry) -> tuple[str, str, list[Measurement]]:
        """Return (name, purpose, measurements): the policy against the best fixed size, both with the beginning kept;
        `carry` adds the simulation's error.
        """
        arms = ADAPTIVE, self.kept.adaptive
        workload = f"serve, simulated, prefix kept, fixed {self.size}"
        judged = simulated.goodput(self.kept, TRAFFIC, self.size, *arms, workload)
        return "prefix caching", "both arms keep the beginning that documents share", [carry(judged)]

    def detail(self, source: str) -> dict[str, tuple[Any, str, str]]:
        """Return the record's detail: name → (value, provenance, source)."""
        return {"prefix_caching": (self.rows, "estimated", f"{source}; {self.caption}")}


def tokens_shared(study: TrafficStudy, share: float) -> int:
    """Return the tokens with which all documents begin: `share` of the shortest one. Raises UserError for a share
    outside [0, 1).
    """
    if not 0 <= share < 1:
        raise UserError(f"prefix caching: shared {share}; expected 0 <= shared < 1")
    return round(share * (1 - SPREAD) * study.setup.documents.prompt_tokens)


def keeping(study: TrafficStudy, tokens: int) -> TrafficStudy:
    """Return the same study with the first `tokens` of longer prompts kept."""
    setup = replace(study.setup, kept=tokens)
    return TrafficStudy(setup, study.headroom, study.requests, study.seeds, study.chunk)


def compare(loaded: Loaded, study: TrafficStudy, size: int, share: float) -> PrefixStudy:
    """Return the best fixed size, chunked prefill and the adaptive policy on the changing trace, with the beginning of
    documents read every time and kept. `size` is the best fixed one where it is read; where it is kept it is chosen
    anew, on the seeds kept for that.
    """
    tokens = tokens_shared(study, share)
    kept = keeping(study, tokens)
    own, _ = kept.choose(TRAFFIC)
    rows = [
        {"shared beginning": label} | row
        for label, each, best in ((READ, study, size), (KEPT, kept, own))
        for row in simulated.compare(each, TRAFFIC, _policies(each, best))
    ]
    return PrefixStudy(kept, tokens, own, rows, (_measured_share(loaded, study, tokens), _simulated_share(kept)))


def _policies(study: TrafficStudy, size: int) -> Mapping[str, PolicyFactory]:
    policies = study.policies(size)
    return {name: policies[name] for name in (f"fixed {size}", f"chunked {study.chunk}", ADAPTIVE)}


def _document(study: TrafficStudy) -> ServingRequest:
    lengths = study.setup.documents
    return ServingRequest(0, 0.0, lengths.prompt_tokens, lengths.new_tokens)


def _simulated_share(kept: TrafficStudy) -> float:
    times, tokens, request = kept.setup.times, kept.setup.kept, _document(kept)
    seconds = times.behind(1, tokens, request.prompt_tokens)
    seconds += times.move(tokens * times.bytes_per_token) if tokens else 0.0
    return seconds / times.prefill(1, request.prompt_tokens)


def _measured_share(loaded: Loaded, study: TrafficStudy, tokens: int) -> float:
    """Return the seconds of one document's prefill behind the kept beginning ÷ those of reading it all; medians of
    calls in turn on the real model.
    """
    request = _document(study)
    prompt_of = serving.prompts(loaded, request.prompt_tokens, study.seeds[0])
    beginning = [batch_cache.prefill(loaded.model, [prompt_of(request)[:tokens]])] if tokens else [None]
    engines = [ModelEngine(loaded.model, prompt_of, kept=kept) for kept in (None, *beginning)]
    seconds: Sequence[list[float]] = [[] for _ in engines]
    for turn in range(ROUNDS + 1):
        for engine, taken in zip(engines, seconds):
            engine.clear()
            took = engine.prefill([request])
            if turn:  # the first warms up
                taken.append(took)
    whole, behind = (float(np.median(taken)) for taken in seconds)
    return behind / whole
