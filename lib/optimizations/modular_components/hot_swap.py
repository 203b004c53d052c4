"""Hot swapping: exchange the contents of a live model for another's while it answers, and restore them bit for bit.

The object that callers hold stays the same. `exchange` swaps the contents of two models of one class (modules,
configuration, hooks) in one assignment and copies nothing; a second call undoes it exactly. A running request has a
cache, so contents whose cache has a different shape are refused until the request is over.

Shapes: B batch, T prompt tokens, N new tokens.
"""

import inspect
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lib.errors import UserError
from lib.models.checkpoints import io
from lib.models.decoding import cache_names
from lib.models.structure.anatomy import anatomy, carry_rope_deltas, reset_rope_deltas


def cache_shape(model: nn.Module) -> list[tuple[str, int, int]]:
    """Return the shape of the cache per token for each block: (kind of attention, key-value heads, elements)."""
    views = [block.attention for block in anatomy(model).blocks]
    return [(view.kind, view.key_value_heads, view.cache_elements_per_token) for view in views]


def exchange(first: nn.Module, second: nn.Module) -> None:
    """Swap the contents of two models of one class in place; a second call undoes it exactly.

    Raises UserError if their classes differ, or if one has its own `forward` or a method bound to itself, which would
    still reach the wrong object.
    """
    if type(first) is not type(second):
        raise UserError(f"live model: cannot put a {type(second).__name__} in the place of a {type(first).__name__}")
    for model in (first, second):
        for name, value in vars(model).items():
            if name == "forward" or (inspect.ismethod(value) and value.__self__ is model):
                raise UserError(f"live model: {type(model).__name__}.{name} belongs to its object; it cannot be moved")
    first.__dict__, second.__dict__ = second.__dict__, first.__dict__


@dataclass
class Live:
    """A model in use. `model` is the object that requests call; `original` holds its contents while another runs."""

    model: nn.Module
    original: nn.Module | None = None
    requests: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def swap(self, optimized: nn.Module) -> float:
        """Run `optimized` from now on; return the seconds that requests had to wait.

        The object `optimized` holds the original's contents until `revert`. Raises UserError if something is swapped in
        already, or if the cache of a running request would not fit.
        """
        if self.original is not None:
            raise UserError("live model: another model is swapped in already; revert first")
        ours, theirs = cache_shape(self.model), cache_shape(optimized)
        with self.lock:
            if self.requests and ours != theirs:
                raise UserError(
                    f"live model: {self.requests} request under way with a cache of {_in_words(ours)}; the other "
                    f"model's cache has {_in_words(theirs)}. Swap between requests"
                )
            start = time.perf_counter()
            if self.requests:
                carry_rope_deltas(self.model, optimized)
            exchange(self.model, optimized)
            self.original = optimized
            return time.perf_counter() - start

    def revert(self) -> float:
        """Restore the original's contents; return the seconds that requests had to wait.

        Raises UserError if nothing is swapped in, or if the cache of a running request would not fit.
        """
        if self.original is None:
            raise UserError("live model: nothing is swapped in; there is nothing to revert")
        with self.lock:
            if self.requests and cache_shape(self.model) != cache_shape(self.original):
                raise UserError("live model: a request is under way whose cache would not fit; revert when it is over")
            start = time.perf_counter()
            if self.requests:
                carry_rope_deltas(self.model, self.original)
            exchange(self.model, self.original)
            self.original = None
            return time.perf_counter() - start

    @torch.inference_mode()
    def generate(
        self, prompt_BT: torch.Tensor, new_tokens: int, between: Callable[[int], object] | None = None
    ) -> torch.Tensor:
        """Return the greedy answer to a prompt, token ids [B, N]; `between(n)` is called, unlocked, after n tokens."""
        self.requests += 1
        try:
            reset_rope_deltas(self.model)
            token_BT, cache, answer = prompt_BT, None, []
            for count in range(1, new_tokens + 1):
                with self.lock:
                    output = self.model(
                        input_ids=token_BT, **cache_names.as_kwargs(cache), use_cache=True, logits_to_keep=1
                    )
                token_BT, cache = output.logits[:, -1:].argmax(-1), cache_names.of(output)
                answer.append(token_BT)
                if between is not None:
                    between(count)
            return torch.cat(answer, dim=1)
        finally:
            self.requests -= 1


def _in_words(shape: list[tuple[str, int, int]]) -> str:
    return f"{len(shape)} blocks of {max(elements for _, _, elements in shape)} elements per token"


@dataclass(frozen=True)
class ExchangeReport:
    """The result of one exchange: the seconds waited, the number of tokens of an answer that changed (None: nothing
    could be exchanged), and why it was not possible in mid-request, or not at all.
    """

    waits: list[float]
    changed: int | None
    reason: str | None

    @property
    def done(self) -> bool:
        """Whether the other model was swapped in, and back out again."""
        return self.changed is not None


def trial(live: Live, replacement: nn.Module, prompt_BT: torch.Tensor, new_tokens: int) -> ExchangeReport:
    """Swap `replacement` in after a third of an answer and back after two thirds, or between requests if its cache
    would not fit. The original runs again afterwards.
    """
    expected, waits, reasons = live.generate(prompt_BT, new_tokens), [], []

    def between(count: int) -> None:
        if count == new_tokens // 3:
            try:
                waits.append(live.swap(replacement))
            except UserError as error:
                reasons.append(str(error))
        if count == 2 * new_tokens // 3 and live.original is not None:
            waits.append(live.revert())

    answer = live.generate(prompt_BT, new_tokens, between)
    if reasons:
        try:
            waits.append(live.swap(replacement))
        except UserError as error:
            return ExchangeReport([], None, str(error))
        try:
            answer = live.generate(prompt_BT, new_tokens)
        finally:
            waits.append(live.revert())
    return ExchangeReport(waits, int((answer != expected).sum()), reasons[0] if reasons else None)


@dataclass(frozen=True)
class LiveExchange:
    """The result of exchanging every part into a live model: seconds waited, a row per part, whether the model was
    bit-identical afterwards, and what was compared. A part whose "tokens changed" is None was not exchanged at all.
    """

    waits: list[float]
    rows: list[dict[str, object]]
    identical: bool
    compared: str = "weights and logits"

    @property
    def done(self) -> int:
        """The number of parts that were exchanged."""
        return sum(row.get("tokens changed", 0) is not None for row in self.rows)

    @property
    def reverted(self) -> str:
        """The result of the comparison after the exchanges, as a phrase."""
        if not self.done:
            return "nothing could be exchanged"
        comparison = "identical" if self.identical else "different"
        return f"{self.compared} {comparison} after {self.done} exchange{'s' if self.done > 1 else ''}"

    @property
    def caption(self) -> str:
        """The result of the comparison, and the longest wait."""
        waited = f"; longest wait {self.longest_ms:.3f} ms" if self.waits else ""
        return f"After reverting: {self.reverted}{waited}."

    @property
    def longest_ms(self) -> float:
        """The longest wait in milliseconds; NaN if nothing was exchanged."""
        return 1000 * max(self.waits, default=float("nan"))


def exchange_all(
    model: nn.Module,
    replacements: Iterable[tuple[str, nn.Module]],
    question_BT: torch.Tensor,
    new_tokens: int,
    weights: str,
) -> LiveExchange:
    """Swap each of the `replacements` (name, model) into the live model in mid-request and back, and check that its
    `weights` (a hash), its logits and its answer are unchanged.

    Logits that differ from call to call anyway, as on some GPUs, are not compared. If a trace remains, weights and
    buffers are restored, since all later measurements use them. Raises AssertionError if a trace remains even so, for
    example from a hook.
    """
    live = Live(model)
    kept = {name: tensor.detach().clone() for name, tensor in _tensors(model)}

    def answered() -> tuple[torch.Tensor, torch.Tensor]:
        return model(input_ids=question_BT).logits, live.generate(question_BT, new_tokens)

    expected = answered()
    repeats = _equal(answered(), expected)
    waits: list[float] = []
    rows: list[dict[str, object]] = []
    for name, replacement in replacements:
        report = trial(live, replacement, question_BT, new_tokens)
        waits += report.waits
        why = report.reason if report.done else f"not at all: {report.reason}"
        rows.append({"swapped in": name, "in mid-request": why or "yes", "tokens changed": report.changed})

    def as_before() -> bool:
        return io.weights_hash(model) == weights and (not repeats or _equal(answered(), expected))

    identical = as_before()
    if not identical:
        _put_back(model, kept)
        if not as_before():
            raise AssertionError("reverting left a trace that cannot be removed: the baseline answers differently")
    compared = "weights and logits" if repeats else "weights (logits differ from call to call)"
    return LiveExchange(waits, rows, identical, compared)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _put_back(model: nn.Module, kept: Mapping[str, torch.Tensor]) -> None:
    """Restore parameters and buffers, including non-persistent ones, from the copies in `kept`."""
    with torch.no_grad():
        for name, tensor in _tensors(model):
            if name in kept and kept[name].shape == tensor.shape:
                tensor.copy_(kept[name])


def _equal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))
