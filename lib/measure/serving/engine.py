"""A real model as the engine of the server loop (`lib.measure.serving.server`), timed call by call.

All rows share one cache (`lib.models.decoding.batch_cache`). Decoding is greedy, lengths are fixed, and the tokens of
every request are stored. Knows nothing about queues, policies or objectives.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lib.errors import UserError
from lib.measure.serving.protocol import grouped, kept_of
from lib.measure.serving.traffic import ServingRequest
from lib.measure.timing import workloads
from lib.models.decoding import batch_cache
from lib.models.loading import Loaded
from lib.models.tasks import retrieval


class ModelEngine:
    """Serves requests with `model`; `prompt_of(request)` returns the token ids [T] of the request's prompt.

    `kept` is the cache of the tokens with which all longer prompts begin (prefix caching): a separate row that is
    copied and never changed. `output` maps a request's id to its token ids so far. If `limit_bytes` is given, the
    cache's real bytes are compared with it after every call: exceeding the bound is an error, not a statistic.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt_of: Callable[[ServingRequest], torch.Tensor],
        limit_bytes: float | None = None,
        kept: batch_cache.Rows | None = None,
    ):
        if reason := batch_cache.joinable(model):
            raise UserError(f"serving: rows cannot join this model's batch: {reason}")
        self.model, self.prompt_of, self.limit_bytes, self.kept = model, prompt_of, limit_bytes, kept
        self.synchronize = workloads.barrier(model)
        self.clear()

    def clear(self) -> None:
        """Remove all rows and all output."""
        self.rows: batch_cache.Rows | None = None
        self.reading: dict[int, batch_cache.Rows] = {}
        self.ids: list[int] = []
        self.output: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """Bytes that the cache holds now, including the caches of prompts that are being read in parts."""
        return (self.rows.bytes if self.rows is not None else 0) + sum(row.bytes for row in self.reading.values())

    def prefill(self, requests: Sequence[ServingRequest]) -> float:
        """Read the prompts together and add their rows to the batch; return the seconds it took."""
        groups = grouped(requests, 0 if self.kept is None else self.kept.length)
        prompts = {kept: [self.prompt_of(request)[kept:] for request in group] for kept, group in groups.items()}
        start = time.perf_counter()
        for kept, group in groups.items():
            behind = self.kept if kept else None
            self._join(group, batch_cache.prefill(self.model, prompts[kept], behind))
        return self._since(start)

    def _join(self, requests: Sequence[ServingRequest], joining: batch_cache.Rows) -> None:
        """Add the rows of `requests`, whose prompts have been read, to the running batch."""
        first = joining.token_B.tolist()
        self.rows = joining if self.rows is None else batch_cache.join(self.rows, joining)
        for request, token in zip(requests, first):
            self.ids.append(request.id)
            self.output[request.id] = [token]
            self.lengths[request.id] = request.new_tokens

    def decode(self) -> float:
        """Decode one token of every row; return the seconds it took. Raises RuntimeError if there are no rows."""
        if self.rows is None:
            raise RuntimeError("there are no rows to decode")
        start = time.perf_counter()
        self._step(self.rows)
        return self._since(start)

    def _step(self, rows: batch_cache.Rows) -> None:
        for request, token in zip(self.ids, batch_cache.step(self.model, rows).tolist()):
            if len(self.output[request]) < self.lengths[request]:
                self.output[request].append(token)

    def shared(self, parts: Sequence[tuple[ServingRequest, int]]) -> float:
        """Decode a token of every row and read the given number of further tokens of each prompt; return the seconds
        it took.

        These are separate passes, one after the other: a padded cache has no room for both in one pass.
        """
        prompts = [self.prompt_of(request) for request, _ in parts]
        start = time.perf_counter()
        if self.rows is not None:
            self._step(self.rows)
        for (request, count), prompt_T in zip(parts, prompts):
            row = self.reading.pop(request.id, None)
            if row is None and self.kept is not None and kept_of(request, self.kept.length):
                row = batch_cache.repeat(self.kept, 1)
            done = 0 if row is None else row.length
            row = batch_cache.read_on(self.model, row, prompt_T[done : done + count])
            if row.length == len(prompt_T):
                self._join([request], row)
            else:
                self.reading[request.id] = row
        return self._since(start)

    def leave(self, ids: Sequence[int]) -> float:
        """Remove the rows of the requests `ids` from the batch; return the seconds it took."""
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
    """Return a function from a request to its prompt, ids [T] of held-out text of the model's corpus.

    The place in the text depends only on the request's id and `seed`. With random weights the tokens are random.
    """
    windows = max(2, min(64, 65536 // max(1, longest)))
    stream_T = retrieval.text_windows(loaded, "final", windows, max(2, longest), seed).flatten().cpu()

    def prompt_of(request: ServingRequest) -> torch.Tensor:
        start = (request.id * 7919 + seed * 104729) % max(1, len(stream_T) - request.prompt_tokens)
        return stream_T[start : start + request.prompt_tokens]

    return prompt_of
