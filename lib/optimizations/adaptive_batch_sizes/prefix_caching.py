"""Prefix caching under every policy: documents share a prefix (instructions, examples) whose cache is kept and copied
instead of computed again (Zheng et al. 2024, SGLang, NeurIPS, section 3; also in vLLM).

The question is whether an adaptive batch size still gains if the engine has less prefill to do. Lengths, rates and
traces stay the same. Rows here hold whole copies of the prefix, so time is saved but no memory.
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
ROUNDS = 5  # of a document's prefill on the real model, with and without the cached prefix
TRAFFIC = "changing"


@dataclass(frozen=True)
class PrefixStudy:
    """The study in which the first `tokens` of documents are cached, its best fixed `size`, and `rows` of both studies.

    `shares`: seconds of one document's prefill with ÷ without the cached prefix, on the real model and in simulation.
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
        """The number of shared tokens, and the saving for one document's prefill, measured and simulated.

        Requests have no kind, so chats that are longer than the prefix are served with it too.
        """
        real, simulation = self.shares
        longest_chat = round((1 + SPREAD) * self.kept.setup.chat.prompt_tokens)
        chats = f" So do chats of more than {self.tokens}." if 0 < self.tokens < longest_chat else ""
        return (
            f"Changing trace, simulated; documents share {self.tokens} tokens.{chats} With these cached, one prefill "
            f"takes {real:.2f} of the time on the real model, {simulation:.2f} in simulation."
        )

    def control(self, carry: Carry) -> tuple[str, str, list[Measurement]]:
        """Return (name, purpose, measurements): the policy against the best fixed size, both with the cached prefix;
        `carry` adds the simulation error.
        """
        arms = ADAPTIVE, self.kept.adaptive
        workload = f"serve, simulated, prefix kept, fixed {self.size}"
        judged = simulated.goodput(self.kept, TRAFFIC, self.size, *arms, workload)
        return "prefix caching", "both arms keep the beginning that long prompts share", [carry(judged)]

    def detail(self, source: str) -> dict[str, tuple[Any, str, str]]:
        """Return the record's detail: name → (value, provenance, source)."""
        return {"prefix_caching": (self.rows, "estimated", f"{source}; {self.caption}")}


def tokens_shared(study: TrafficStudy, share: float) -> int:
    """Return the length in tokens of the prefix of all documents: `share` of the shortest one.

    Raises UserError for a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise UserError(f"prefix caching: shared {share}; expected 0 <= shared < 1")
    return round(share * (1 - SPREAD) * study.setup.documents.prompt_tokens)


def keeping(study: TrafficStudy, tokens: int) -> TrafficStudy:
    """Return the same study with the first `tokens` of longer prompts cached."""
    setup = replace(study.setup, kept=tokens)
    return TrafficStudy(setup, study.headroom, study.requests, study.seeds, study.chunk)


def compare(loaded: Loaded, study: TrafficStudy, size: int, share: float) -> PrefixStudy:
    """Return the best fixed size, chunked prefill and the adaptive policy on the changing trace, without and with
    cached document prefixes.

    `size` is the best fixed size without caching; with caching it is chosen again, on the seeds for choosing.
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
    """Return the seconds of one document's prefill after the cached prefix ÷ those of the whole prefill: medians over
    calls taking turns on the real model.
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
