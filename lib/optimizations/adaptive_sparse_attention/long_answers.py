"""Retrieve many values from one long prompt: enough answers to judge, at the length that is timed.

Keys and values are spread over a prompt of held-out text, which is read once. Then each key is fed token by token on a
copy of the cache, and the model's probabilities of the value's tokens give the log-likelihood of the answer, and
whether greedy generation would repeat it exactly (it does if every token of the value is the most likely next one). So
prompts are read through the pattern, and questions are decoded from the chosen pages.

Shapes: N prompts, T tokens, Q questions per prompt, B of them asked side by side, K tokens of a key, V of a value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from torch import nn
from transformers import DynamicCache

from lib.errors import UserError
from lib.measure.metrics.measurement import Measurement
from lib.measure.quality import answer_comparison, noninferiority
from lib.measure.quality.answers import Retrieved
from lib.measure.roofline import cost_model
from lib.models.decoding import cache_names
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy, reset_rope_deltas
from lib.models.tasks import tasks as task_list
from lib.models.tasks.retrieval import KEY, LEAD, VALUE, random_ids
from lib.optimizations.adaptive_sparse_attention.paged_cache import PagedLayer

QUESTIONS = 25  # per prompt
PAGE = 16  # tokens per page of a cache from which no pages are chosen
COPIED_BYTES = 2**31  # most bytes of cache copies for questions asked side by side
PLACES = ("start", "middle", "end")  # thirds of a prompt


@dataclass(frozen=True)
class LongPrompts:
    """Prompts [N, T] with their keys [N, Q, K] and values [N, Q, V] in order; `source_N` is the document in which each
    prompt's text starts, if known.
    """

    ids_NT: torch.Tensor
    key_NQK: torch.Tensor
    value_NQV: torch.Tensor
    source_N: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        return self.ids_NT.shape[1]

    def first(self, prompts: int) -> "LongPrompts":
        """Return the first `prompts` prompts."""
        few = (self.ids_NT[:prompts], self.key_NQK[:prompts], self.value_NQV[:prompts])
        return LongPrompts(*few, None if self.source_N is None else self.source_N[:prompts])


@dataclass(frozen=True)
class LongAnswers:
    """Answers of one arm: whether each value was repeated exactly, and its nats per token, [N, Q].

    `source_N` is the document of each prompt, by default a separate one. `idle`: the optimization never acted on these
    prompts. Questions about one prompt share it, so answers are resampled by document.
    """

    tokens: int
    right_NQ: np.ndarray
    loss_NQ: np.ndarray
    source_N: np.ndarray | None = None
    idle: bool = False

    @property
    def documents_N(self) -> np.ndarray:
        """The document of each prompt."""
        return np.arange(len(self.right_NQ)) if self.source_N is None else self.source_N

    @property
    def retrieved(self) -> Retrieved:
        """All values as answers to one task."""
        return self._retrieved(self.right_NQ)

    def first(self, prompts: int) -> "LongAnswers":
        """Return the answers to the first `prompts` prompts."""
        few = None if self.source_N is None else self.source_N[:prompts]
        return LongAnswers(self.tokens, self.right_NQ[:prompts], self.loss_NQ[:prompts], few, self.idle)

    def at(self, place: str) -> Retrieved:
        """Return the values of one of PLACES as answers to one task."""
        return self._retrieved(np.array_split(self.right_NQ, len(PLACES), axis=1)[PLACES.index(place)])

    def _retrieved(self, right_NX: np.ndarray) -> Retrieved:
        source_X = np.repeat(self.documents_N, right_NX.shape[1])
        return Retrieved(self.tokens, right_NX.flatten(), source_N=source_X)


def prompts(loaded: Loaded, tokens: int, count: int, questions: int = QUESTIONS, seed: int = 0) -> LongPrompts:
    """Return `count` prompts of `tokens` tokens of held-out text with `questions` evenly spread keys and values, or as
    many as fit without overlap. Raises UserError if fewer fit than there are PLACES.
    """
    fitting = (tokens - LEAD - KEY - VALUE) // (KEY + VALUE + 1)  # one token apart
    if fitting < len(PLACES):
        raise UserError(
            f"prompts of {tokens} tokens hold fewer than {len(PLACES)} keys and values, one for each third; "
            "give longer prompts"
        )
    questions = min(questions, fitting)
    distance = tokens - LEAD - KEY - VALUE
    filler_NX, _ = task_list.retrieval_prompts(loaded, distance, count, seed)
    ids_NT, random = filler_NX[:, :tokens].cpu().clone(), torch.Generator().manual_seed(seed + 1)
    key_NQK = random_ids(loaded, (count, questions, KEY), random)
    value_NQV = random_ids(loaded, (count, questions, VALUE), random)
    place_Q = torch.linspace(LEAD, tokens - 2 * (KEY + VALUE), questions).long().tolist()
    for question, place in enumerate(place_Q):
        ids_NT[:, place : place + KEY] = key_NQK[:, question]
        ids_NT[:, place + KEY : place + KEY + VALUE] = value_NQV[:, question]
    source_N = task_list.filler_sources(loaded, distance, count, seed)
    ids_NT, key_NQK, value_NQV = (ids.to(loaded.device) for ids in (ids_NT, key_NQK, value_NQV))
    return LongPrompts(ids_NT, key_NQK, value_NQV, source_N)


@torch.inference_mode()
def ask(model: Any, long_prompts: LongPrompts, acted: Callable[[], float] | None = None) -> LongAnswers:
    """Return the answers of `model`: it reads every prompt once and answers all its questions from copies of the
    cache. `acted` returns how much the optimization has acted so far, as in `evaluate.evaluate`.
    """
    before = acted() if acted else None
    questions = long_prompts.key_NQK.shape[1]
    rows = _side_by_side(model, long_prompts.tokens, questions)
    right, loss = [], []
    for ids_T, key_QK, value_QV in zip(long_prompts.ids_NT, long_prompts.key_NQK, long_prompts.value_NQV):
        reset_rope_deltas(model)
        inputs = {"input_ids": ids_T[None], "use_cache": True, "logits_to_keep": 1}
        output = model(**inputs, **cache_names.as_kwargs(_appending(model)))
        cache = cache_names.of(output)
        cache.batch_repeat_interleave(rows)
        for key_BK, value_BV in zip(key_QK.split(rows), value_QV.split(rows)):
            right_B, loss_B = _answer(model, cache, key_BK, value_BV)
            right.append(right_B)
            loss.append(loss_B)
    right_NQ, loss_NQ = (np.concatenate(each).reshape(len(long_prompts.ids_NT), questions) for each in (right, loss))
    idle = acted is not None and acted() == before
    return LongAnswers(long_prompts.tokens, right_NQ, loss_NQ, long_prompts.source_N, idle)


def _appending(model: nn.Module) -> DynamicCache:
    """Return an empty cache that appends in place; the stock cache would copy all it holds for every token."""
    cache = DynamicCache()
    modules = [block.attention.module for block in anatomy(model).blocks if block.attention.kind != "none"]
    latent = ["expand_kv" in vars(module) for module in modules]
    sizes = [getattr(getattr(module, "sparsity", None), "page_size", PAGE) for module in modules]
    cache.layers = [PagedLayer(*each) for each in zip(sizes, latent)]
    return cache


def _side_by_side(model: nn.Module, tokens: int, questions: int) -> int:
    """Return how many questions to ask at once: a divisor of `questions` whose cache copies fit into COPIED_BYTES."""
    each = tokens * cost_model.kv_cache_bytes_per_token(model)
    fitting = [rows for rows in range(1, questions + 1) if questions % rows == 0 and rows * each <= COPIED_BYTES]
    return max(fitting, default=1)


def _answer(model: Any, cache: Any, key_BK: torch.Tensor, value_BV: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each value is the most likely answer, and its nats per token, [B]; the cache is restored."""
    fed_BX, likely, nats = torch.cat([key_BK, value_BV[:, :-1]], dim=1), [], []
    for step in range(fed_BX.shape[1]):
        inputs = {"input_ids": fed_BX[:, step : step + 1], "use_cache": True, "logits_to_keep": 1}
        logits_BX = model(**inputs, **cache_names.as_kwargs(cache)).logits[:, -1].float()
        place = step - KEY + 1
        if place >= 0:
            target_B = value_BV[:, place]
            likely.append(logits_BX.argmax(-1) == target_B)
            nats.append(nn.functional.cross_entropy(logits_BX, target_B, reduction="none"))
    cache.crop(-fed_BX.shape[1])
    return torch.stack(likely, 1).all(1).cpu().numpy(), torch.stack(nats, 1).mean(1).cpu().numpy()


def compare(baseline: LongAnswers, optimized: LongAnswers, **options: int) -> list[Measurement]:
    """Return exact match over all values and the perplexity of the answers over prompts.

    Both are judged with resampling by document, unless the optimized arm was idle. `options` are those of
    `answer_comparison.compare`: resamples, seed.
    """
    match = answer_comparison.compare_retrieved(baseline.retrieved, optimized.retrieved, **options)
    count, questions = baseline.loss_NQ.shape
    source = f"{questions} answers after each of {count} prompts of {baseline.tokens} tokens, means of prompts"
    common: dict[str, Any] = {"source": source, "source_N": baseline.documents_N, **options}
    likelihood = noninferiority.perplexity(baseline.loss_NQ.mean(1), optimized.loss_NQ.mean(1), **common)
    both = [match, likelihood.model_copy(update={"workload": "answers behind a long prompt"})]
    return [answer_comparison.not_exercised(m) if optimized.idle else m for m in both]


def bars(answers: Mapping[str, LongAnswers]) -> pd.DataFrame:
    """Return the shares of values repeated for `style.bars`: a bar per third of a prompt and arm, with Wilson's
    interval, which treats questions about one prompt as independent.
    """
    rows = []
    for place in PLACES:
        for arm, answered in answers.items():
            right_X = answered.at(place).right_N
            spread = binomtest(int(right_X.sum()), len(right_X)).proportion_ci(method="wilson")
            row = {"arm": f"{place}, {arm}", "value": float(right_X.mean()), "low": spread.low, "high": spread.high}
            rows.append(row)
    return pd.DataFrame(rows)
