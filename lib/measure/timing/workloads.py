"""The timed workloads: prefill, decode, generate. Drives a decoder token by token. Knows nothing about how it is timed.

Every workload is a callable without arguments. Its length is fixed (no end-of-text stop), and its tokens are counted in
the model's own output. No prompt is served from a warm prefix: every prefill starts with an empty cache. Untimed work
(the prefill before a decode) is done once in advance (`steps`), or by `prepare`, which `lib.measure.timing.interleaved`
calls before it starts the clock.

Shapes: B batch, T prompt tokens, N new tokens.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lib.models.decoding import cache_names
from lib.models.structure.anatomy import reset_rope_deltas

Prompt = torch.Tensor | Mapping[str, torch.Tensor]
BATCH_PROMPT_TOKENS = 128
TURN_STEPS = 2  # decoding steps in one timed call: the shorter the turns, the less the machine changes between them


@dataclass
class Workload:
    """A timed workload. `tokens` is the number of tokens that one call processes (prefill) or produces (decode,
    generate), over all sequences.

    `output_BN` holds the token ids of the last call (for `steps`, of the first turn), `step_seconds` the time of every
    decoding step (on CUDA between events in the device's stream). `conditions` must be equal in both arms. The whole
    work consists of `turns` calls; `restart` returns to the first.
    """

    name: str
    call: Callable[["Workload"], object]
    tokens: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    conditions: dict[str, object]
    prepare: Callable[[], object] | None = None
    synchronize: Callable[[], object] | None = None
    output_BN: torch.Tensor | None = None
    step_seconds: list[float] = field(default_factory=list)
    turns: int = 1
    restart: Callable[[], object] | None = None

    def whole(self) -> None:
        """Do the whole work once, from its first turn."""
        if self.restart:
            self.restart()
        for _ in range(self.turns):
            self()

    def __call__(self) -> object:
        return self.call(self)


def prefill(model: nn.Module, prompt: Prompt) -> Workload:
    """Return the work of reading a prompt (ids [B, T], or a dictionary of inputs) up to the first new token.

    `tokens` is B·T. The time of one call is the time to first token.
    """
    inputs = _inputs(model, prompt)
    batch, length = inputs["input_ids"].shape

    def call(work: Workload) -> None:
        work.output_BN = _first(model, inputs)[0]

    return Workload("prefill", call, batch * length, batch, length, 1, _conditions(model, inputs), None, barrier(model))


def decode(model: nn.Module, prompt: Prompt, new_tokens: int) -> Workload:
    """Return the work of `new_tokens` greedy steps; the prompt's prefill is not timed. `tokens` is B·new_tokens."""
    inputs = _inputs(model, prompt)
    batch, length = inputs["input_ids"].shape
    state: dict[str, Any] = {}

    def prepare() -> None:
        state["first_B1"], state["cache"] = _first(model, inputs)

    def call(work: Workload) -> None:
        if not state:
            prepare()
        work.output_BN = _steps(model, state.pop("first_B1"), state.pop("cache"), new_tokens, work)

    return Workload(
        "decode",
        call,
        batch * new_tokens,
        batch,
        length,
        new_tokens,
        _conditions(model, inputs),
        prepare,
        barrier(model),
    )


def steps(model: nn.Module, prompt: Prompt, new_tokens: int, at_once: int | None = None) -> Workload:
    """Return the work of `decode` at a fixed context: the prompt is read once, now, and after `new_tokens` decoded
    tokens these are removed from the cache again. For long prompts, whose prefill would take most of the time.

    One call decodes `at_once` tokens (default: all) and continues where the last one stopped, so that arms can take
    turns within an answer. `at_once` is lowered to a divisor of `new_tokens`.
    """
    inputs = _inputs(model, prompt)
    batch, length = inputs["input_ids"].shape
    first_B1, cache = _first(model, inputs)
    count = next(n for n in range(min(at_once or new_tokens, new_tokens), 0, -1) if new_tokens % n == 0)
    state: dict[str, Any] = {"token_B1": first_B1, "done": 0}
    windows = [(layer, dict(vars(layer))) for layer in cache.layers if getattr(layer, "is_sliding", False)]

    def restart() -> None:
        if state["done"]:
            for layer in cache.layers:
                if not getattr(layer, "is_sliding", False):
                    layer.crop(-state["done"])
            for layer, before in windows:  # tokens that left a window are lost to `crop`; the tensors stay unchanged
                vars(layer).update(before)
        state.update(token_B1=first_B1, done=0)

    def call(work: Workload) -> None:
        produced_BN = _steps(model, state["token_B1"], cache, count, work)
        if not state["done"]:
            work.output_BN = produced_BN
        state.update(token_B1=produced_BN[:, -1:], done=state["done"] + count)
        if state["done"] == new_tokens:
            restart()

    work = Workload(
        "decode", call, batch * count, batch, length, count, _conditions(model, inputs), None, barrier(model)
    )
    work.turns, work.restart = new_tokens // count, restart
    return work


def generate(model: nn.Module, prompt: Prompt, new_tokens: int) -> Workload:
    """Return the work of answering a prompt end to end: prefill and greedy decoding steps. `tokens` is B·new_tokens."""
    inputs = _inputs(model, prompt)
    batch, length = inputs["input_ids"].shape

    def call(work: Workload) -> None:
        first_B1, cache = _first(model, inputs)
        rest_BN = _steps(model, first_B1, cache, new_tokens - 1, work)
        work.output_BN = torch.cat([first_B1, rest_BN], dim=1)

    return Workload(
        "generate",
        call,
        batch * new_tokens,
        batch,
        length,
        new_tokens,
        _conditions(model, inputs),
        None,
        barrier(model),
    )


def standard(name: str, model: nn.Module, prompt_1T: torch.Tensor, new_tokens: int, batch: int) -> Workload:
    """Return one of the standard workloads for comparing models: prefill, decode, batch_decode or generate.

    Decoding is timed at a fixed context, a few tokens per call (`steps`). The `batch` prompts of `batch_decode` are
    rolled copies of the prompt's beginning: different, of equal length, and short, since only decoding is timed. Raises
    ValueError for another name.
    """
    if name == "prefill":
        return prefill(model, prompt_1T)
    if name == "decode":
        return steps(model, prompt_1T, new_tokens, TURN_STEPS)
    if name == "generate":
        return generate(model, prompt_1T, new_tokens)
    if name != "batch_decode":
        raise ValueError(f'unknown workload "{name}": expected prefill, decode, batch_decode or generate')
    short_1T = prompt_1T[:1, :BATCH_PROMPT_TOKENS]
    rolled_BT = torch.cat([short_1T.roll(shift, 1) for shift in range(batch)])
    return steps(model, rolled_BT, new_tokens, TURN_STEPS)


def random_prompt(model: nn.Module, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids [B, T] from the model's vocabulary, for models without a tokenizer (random weights)."""
    config = _text_config(model)
    # The lowest ids are special tokens, including the placeholders for images.
    floor = min(256, config.vocab_size // 4)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(floor, config.vocab_size // 2, (batch, length), generator=generator)


def assert_same_conditions(baseline: Workload, optimized: Workload, *, except_for: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless both arms have the same prompts, lengths, dtype, device, attention, experts backend and
    number of threads.

    `except_for` names the conditions that the optimization changes on purpose.
    """
    differing = [
        f"{name} ({baseline.conditions[name]} against {optimized.conditions[name]})"
        for name in baseline.conditions
        if name not in except_for and baseline.conditions[name] != optimized.conditions[name]
    ]
    for name in ("name", "batch", "tokens", "new_tokens"):
        if name not in except_for and getattr(baseline, name) != getattr(optimized, name):
            differing.append(f"{name} ({getattr(baseline, name)} against {getattr(optimized, name)})")
    if differing:
        raise ValueError(f"the arms are not comparable: they differ in {', '.join(differing)}")


def output_hash(work: Workload) -> str:
    """Return a hash of the last call's tokens, which shows whether two arms did the same."""
    return "" if work.output_BN is None else hashlib.sha256(work.output_BN.cpu().numpy().tobytes()).hexdigest()[:12]


@torch.inference_mode()
def _first(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """Run the prompt; return the first greedy token [B, 1] and the new cache."""
    reset_rope_deltas(model)
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(-1), cache_names.of(output)


@torch.inference_mode()
def _steps(model: nn.Module, token_B1: torch.Tensor, cache: Any, steps: int, work: Workload) -> torch.Tensor:
    """Decode `steps` tokens greedily after `token_B1`; return them [B, steps]."""
    produced, marks = [], [_mark(token_B1)]
    for _ in range(steps):
        output = model(input_ids=token_B1, **cache_names.as_kwargs(cache), use_cache=True, logits_to_keep=1)
        token_B1, cache = output.logits[:, -1:].argmax(-1), cache_names.of(output)
        produced.append(token_B1)
        marks.append(_mark(token_B1))
    work.step_seconds += _between(marks)
    return torch.cat(produced, dim=1) if produced else token_B1[:, :0]


def _mark(tensor: torch.Tensor) -> float | torch.cuda.Event:
    """Return a time stamp: the clock's seconds, or on CUDA an event in the device's stream, which causes no delay."""
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(marks: Sequence[Any]) -> list[float]:
    """Return the seconds between neighbouring marks."""
    if isinstance(marks[0], float):
        return [later - earlier for earlier, later in pairwise(marks)]
    marks[-1].synchronize()
    return [earlier.elapsed_time(later) / 1000 for earlier, later in pairwise(marks)]


def _device(model: nn.Module) -> torch.device:
    """Return the device on which the model computes; parameters on disk (device meta) are ignored."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def _inputs(model: nn.Module, prompt: Prompt) -> dict[str, torch.Tensor]:
    device = _device(model)
    inputs = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": prompt}
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}


def _conditions(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, object]:
    weight = next(model.parameters())
    config = _text_config(model)
    digest = hashlib.sha256(inputs["input_ids"].cpu().numpy().tobytes()).hexdigest()[:12]
    return {
        "prompt": digest,
        "dtype": str(weight.dtype),
        "device": str(_device(model)),
        "attention": getattr(config, "_attn_implementation", None),
        "experts": getattr(config, "_experts_implementation", None),
        "threads": torch.get_num_threads(),
    }


def barrier(model: nn.Module) -> Callable[[], object] | None:
    """Return the function that waits for the device; None on a CPU, where work has ended when a call returns."""
    return torch.cuda.synchronize if _device(model).type == "cuda" else None
