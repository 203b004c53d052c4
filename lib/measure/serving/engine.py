"""A real model as the engine of the server loop (`lib.measure.serving.server`), timed call by call.

All rows share one cache (`lib.models.decoding.batch_cache`); decoding is greedy, lengths are forced, and the tokens of
every request are stored. Knows nothing of queues, policies or objectives.
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
    """Serves requests with `model`; `prompt_of(request)` gives the ids [T] of its prompt.

    `kept` is the cache of the tokens with which all longer prompts begin (prefix caching): a row of its own, copied and
    never changed. `output` maps a request's id to its token ids so far. `limit_bytes`, where given, is checked against
    the cache's real bytes after every call: a broken memory bound is an error, not a statistic.
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
        """Forget all rows and all output."""
        self.rows: batch_cache.Rows | None = None
        self.reading: dict[int, batch_cache.Rows] = {}
        self.ids: list[int] = []
        self.output: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """Bytes that the cache holds now, that of prompts which are read in parts included."""
        return (self.rows.bytes if self.rows is not None else 0) + sum(row.bytes for row in self.reading.values())

    def prefill(self, requests: Sequence[ServingRequest]) -> float:
        """Read the prompts together and let their rows join; return the seconds it took."""
        groups = grouped(requests, 0 if self.kept is None else self.kept.length)
        prompts = {kept: [self.prompt_of(request)[kept:] for request in group] for kept, group in groups.items()}
        start = time.perf_counter()
        for kept, group in groups.items():
            behind = self.kept if kept else None
            self._join(group, batch_cache.prefill(self.model, prompts[kept], behind))
        return self._since(start)

    def _join(self, requests: Sequence[ServingRequest], joining: batch_cache.Rows) -> None:
        """Let rows whose prompts have been read join those under way."""
        first = joining.token_B.tolist()
        self.rows = joining if self.rows is None else batch_cache.join(self.rows, joining)
        for request, token in zip(requests, first):
            self.ids.append(request.id)
            self.output[request.id] = [token]
            self.lengths[request.id] = request.new_tokens

    def decode(self) -> float:
        """Produce one token of every row; return the seconds it took. Raises RuntimeError where there are no rows."""
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
        """Decode a token of every row and read so many further tokens of each prompt; return the seconds it took.

        The two are passes of their own, one after the other: a padded cache has no room for both in one.
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
