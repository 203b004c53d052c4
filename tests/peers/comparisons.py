"""Which peer is compared with which part of the workbench, by which metrics, and how each peer is installed.

An arm is a script of `arms/` with its options; the first of a comparison is the peer, the others are compared with it.
To add a peer, write one script and add one entry here.
"""

from dataclasses import dataclass

from tests.peers.environments import Way, release

WORKBENCH = "workbench"


@dataclass(frozen=True)
class Metric:
    """One number of an arm: its key in the arm's result, its label, its unit, and which direction is better (None:
    neither, it is a condition).
    """

    key: str
    title: str
    unit: str
    higher_is_better: bool | None


@dataclass(frozen=True)
class Arm:
    """A script of `arms/` with its options, and where it runs: in the peer's environment or in the workbench's."""

    title: str
    script: str
    options: tuple[str, ...] = ()
    own: bool = True

    @property
    def arguments(self) -> list[str]:
        """The arguments after setting and result on its command line."""
        return list(self.options)


@dataclass(frozen=True)
class Comparison:
    """A peer and the arms compared with it. `once`: the arms take minutes and do the same each time, so one turn is
    enough; else they take turns in fresh processes.
    """

    peer: str
    about: str
    arms: tuple[Arm, ...]
    metrics: tuple[Metric, ...]
    once: bool = False


PEAK = Metric("peak_mb", "peak memory of the process", "MB", False)
PERPLEXITY = Metric("perplexity", "perplexity", "", False)
MINUTES = Metric("minutes", "time to prune", "min", False)
CPU_MINUTES = Metric("cpu_minutes", "processor time to prune", "min", False)
RATES = (
    Metric("prefill_tokens_per_second", "prefill", "tokens/s", True),
    Metric("decode_tokens_per_second", "decode", "tokens/s", True),
    Metric("prefill_tokens_per_cpu_second", "prefill, by processor time", "tokens/s", True),
    Metric("decode_tokens_per_cpu_second", "decode, by processor time", "tokens/s", True),
    Metric("bits_per_weight", "bits per weight", "bits", None),
    PEAK,
)
PRUNED = (PERPLEXITY, Metric("zeros", "zeros in the decoder's matrices", "share", None), MINUTES, CPU_MINUTES, PEAK)
CUT = (
    PERPLEXITY,
    Metric("channels_left", "channels left, all blocks", "", None),
    Metric("weights_mb", "weights", "MB", False),
    MINUTES,
    CPU_MINUTES,
    PEAK,
)


def _pruning(method: str, title: str) -> Comparison:
    arms = (
        Arm(f"llm-compressor, {title}", "llm_compressor", (f"method={method}",)),
        Arm(f"workbench, {title}", "workbench_pruning", (f"method={method}",), own=False),
        Arm(f"workbench, {title}, file to file", "workbench_pruning", (f"method={method}", "from=file"), own=False),
    )
    return Comparison("llm-compressor", f"{title}, half of all weights, the same calibration text", arms, PRUNED, True)


def _channels(rule: str, *beside: str) -> Comparison:
    arms = [Arm(f"Torch-Pruning, by {rule}", "torch_pruning_channels", (f"rule={rule}",))]
    for name in beside:
        title = "activation, refitted" if name == "refitted" else name
        arms.append(Arm(f"workbench, by {title}", "workbench_pruning", (f"channels={name}",), own=False))
    about = "the same share of feed-forward channels removed, nothing trained afterwards"
    return Comparison("torch-pruning", about, tuple(arms), CUT, once=True)


COMPARISONS = (
    Comparison(
        "llama.cpp",
        "the same GGUF file, the same prompt, the same threads",
        (
            Arm("llama.cpp, as the file is", "llama_cpp"),
            Arm("workbench, as loaded", "workbench_speed", ("bits=16",), own=False),
            Arm("workbench, int8 weight-only", "workbench_speed", ("bits=8",), own=False),
            Arm("workbench, int4 weight-only", "workbench_speed", ("bits=4",), own=False),
        ),
        RATES,
    ),
    _pruning("sparsegpt", "SparseGPT"),
    _pruning("wanda", "Wanda"),
    _channels("magnitude", "magnitude"),
    _channels("taylor", "activation", "refitted"),
    Comparison(
        "optimum-benchmark",
        "time to the first token of the same checkpoint, the same prompt length",
        (
            Arm("optimum-benchmark", "optimum_prefill"),
            Arm("workbench, as loaded", "workbench_speed", own=False),
            Arm("a stop-watch", "stop_watch", own=False),
        ),
        (Metric("prefill_ms", "prefill", "ms", False), PEAK),
    ),
)


def ways(peer: str) -> tuple[Way, ...]:
    """Return the ways to install a peer, the likeliest first: with the workbench's torch and transformers, with the
    transformers that its own pins allow, against its pins.
    """
    torch, transformers = release("torch"), release("transformers")
    if peer == "llama.cpp":
        return (Way(("xllamacpp",)),)
    if peer == "llm-compressor":
        package = "llmcompressor>=0.14,<0.15"
        needed = ("accelerate", "auto-round", "compressed-tensors", "datasets", "loguru", "pillow", "requests")
        return (
            Way((torch, transformers, package)),
            Way((torch, package)),
            Way((torch, transformers, *needed), (package,)),
            Way((torch, "transformers<5", *needed), (package,)),
        )
    if peer == "torch-pruning":
        package = "torch-pruning>=1.6,<1.7"
        return (Way((torch, transformers, package)), Way((torch, "transformers<5", package)))
    if peer == "optimum-benchmark":
        package = "optimum-benchmark>=0.6,<0.7"
        return (
            Way((torch, transformers, package)),
            Way((torch, "transformers<5", package)),
            Way((torch, "transformers<4.54", package)),
        )
    raise KeyError(peer)
