"""optimum-benchmark's own measurement of the time to the first token: its scenario, clock and random prompt."""

import dataclasses

import probe
from optimum_benchmark import Benchmark, BenchmarkConfig, InferenceConfig, InlineConfig, PyTorchConfig

setting, _ = probe.read()
probe.use_threads(setting["threads"])  # its own thread option sets inter-operator threads
known = {field.name for field in dataclasses.fields(PyTorchConfig)}
dtype = {"torch_dtype" if "torch_dtype" in known else "dtype": setting["dtype"]}
backend = PyTorchConfig(model=setting["folder"], task="text-generation", library="transformers", device="cpu", **dtype)
scenario = InferenceConfig(
    latency=True,
    iterations=setting["rounds"],
    duration=0,
    warmup_runs=1,
    input_shapes={"batch_size": 1, "sequence_length": len(setting["prompt"])},
    generate_kwargs={"max_new_tokens": 2, "min_new_tokens": 2},
)
config = BenchmarkConfig(name="prefill", launcher=InlineConfig(), scenario=scenario, backend=backend)
latency = Benchmark.launch(config).prefill.latency
values = {"prefill_ms": 1000 * sorted(latency.values)[len(latency.values) // 2], "peak_mb": probe.peak_megabytes()}
probe.write(
    values, ["optimum-benchmark", "torch", "transformers"], "inline, in the arm's own process; its own random prompt"
)
