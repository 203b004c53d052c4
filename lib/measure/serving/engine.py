"""A real model as the engine of the server loop (`lib.measure.serving.server`), timed call by call.

All rows share one cache (`lib.models.decoding.batch_cache`); decoding is greedy, lengths are forced, and the tokens of
every request are stored. Knows nothing of queues, policies or objectives.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lib.errors import UserError
from lib.measure.serving.traffic import ServingRequest
from lib.measure.timing import workloads
from lib.models.decoding import batch_cache
from lib.models.loading import Loaded
from lib.models.tasks import retrieval


class ModelEngine:
    """Serves requests with `model`; `prompt_of(request)` gives the ids [T] of its prompt.

    `output` maps a request's id to its token ids so far. `limit_bytes`, where given, is checked against the cache's
    real bytes after every call: a broken memory bound is an error, not a statistic.
    """

    def __init__(
        self, model: nn.Module, prompt_of: Callable[[ServingRequest], torch.Tensor], limit_bytes: float | None = None
    ):
        if reason := batch_cache.joinable(model):
            raise UserError(f"serving: rows cannot join this model's batch: {reason}")
        self.model, self.prompt_of, self.limit_bytes = model, prompt_of, limit_bytes
        self.synchronize = workloads.barrier(model)
        self.clear()

    def clear(self) -> None:
        """Forget all rows and all output."""
        self.rows: batch_cache.Rows | None = None
        self.ids: list[int] = []
        self.output: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """Bytes that the cache holds now."""
        return self.rows.bytes if self.rows is not None else 0

    def prefill(self, requests: Sequence[ServingRequest]) -> float:
        """Read the prompts together and let their rows join; return the seconds it took."""
        prompts = [self.prompt_of(request) for request in requests]
        start = time.perf_counter()
        joining = batch_cache.prefill(self.model, prompts)
        first = joining.token_B.tolist()
        self.rows = joining if self.rows is None else batch_cache.join(self.rows, joining)
        for request, token in zip(requests, first):
            self.ids.append(request.id)
            self.output[request.id] = [token]
            self.lengths[request.id] = request.new_tokens
        return self._since(start)

    def decode(self) -> float:
        """Produce one token of every row; return the seconds it took. Raises RuntimeError where there are no rows."""
        if self.rows is None:
            raise RuntimeError("there are no rows to decode")
        start = time.perf_counter()
        tokens = batch_cache.step(self.model, self.rows).tolist()
        for request, token in zip(self.ids, tokens):
            if len(self.output[request]) < self.lengths[request]:
                self.output[request].append(token)
        return self._since(start)

    def leave(self, ids: Sequence[int]) -> float:
        """Take rows out of the batch; return the seconds it took."""
        start, gone = time.perf_counter(), set(ids)
        stay = [index for index, request in enumerate(self.ids) if request not in gone]
        self.ids = [self.ids[index] for index in stay]
        self.rows = batch_cache.keep(self.rows, stay) if stay and self.rows is not None else None
        return self._since(start)

    def _since(self, start: float) -> float:
        if self.synchronize:
            self.synchronize()
        if self.limit_bytes is not None and self.bytes > self.limit_bytes:
            raise RuntimeError(f"the cache holds {self.bytes} bytes, over its bound of {self.limit_bytes:.0f}")
        return time.perf_counter() - start


def prompts(loaded: Loaded, longest: int, seed: int = 0) -> Callable[[ServingRequest], torch.Tensor]:
    """Return the function that gives a request its prompt: held-out text of the model's corpus.

    Its place in the text depends on the request's id and `seed` alone. With random weights the tokens are random.
    """
    windows = max(2, min(64, 65536 // max(1, longest)))
    stream_T = retrieval.text_windows(loaded, "final", windows, max(2, longest), seed).flatten().cpu()

    def prompt_of(request: ServingRequest) -> torch.Tensor:
        start = (request.id * 7919 + seed * 104729) % max(1, len(stream_T) - request.prompt_tokens)
        return stream_T[start : start + request.prompt_tokens]

    return prompt_of
