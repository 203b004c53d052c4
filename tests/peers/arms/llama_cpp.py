"""llama.cpp on the same GGUF file, through xllamacpp's own server: its clock, its rates.

No prompt is served from a warm prefix. llama.cpp's decoding clock starts at the first token, which the prompt has
already produced: one step fewer than tokens.
"""

import json
import statistics
import time
import urllib.request

import probe
import xllamacpp

setting, _ = probe.read()
if not setting["gguf"]:
    raise SystemExit(f"{setting['model']}: the checkpoint comes from no GGUF file")
params = xllamacpp.CommonParams()
params.model.path = setting["gguf"]
params.n_ctx = 2 * (len(setting["prompt"]) + setting["new_tokens"])
params.n_parallel = 1
params.warmup = False
for threads in (params.cpuparams, params.cpuparams_batch):
    threads.n_threads = setting["threads"]
server = xllamacpp.Server(params)

completion_options = {"prompt": setting["prompt"], "ignore_eos": True, "cache_prompt": False}
completion_options |= {"temperature": 0, "top_k": 1, "samplers": ["top_k"]}


def completion(tokens: int) -> dict:
    """Return llama.cpp's timings of one prompt and an answer of the given length in tokens, and the processor seconds
    of both.
    """
    address, busy = f"{server.listening_address}/completion", time.process_time()
    body = json.dumps(completion_options | {"n_predict": tokens}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        timings = json.loads(answer.read())["timings"]
    if (timings["prompt_n"], timings["predicted_n"]) != (len(setting["prompt"]), tokens):
        raise SystemExit(f"llama.cpp read {timings['prompt_n']} tokens and wrote {timings['predicted_n']}")
    return timings | {"busy": time.process_time() - busy}


completion(1)
firsts, rounds = zip(*[(completion(1), completion(setting["new_tokens"] + 1)) for _ in range(setting["rounds"])])
prompt_busy = statistics.median(timings["busy"] for timings in firsts)
decode_busy = statistics.median(both["busy"] - first["busy"] for first, both in zip(firsts, rounds))
prompt_ms = statistics.median(timings["prompt_ms"] for timings in rounds)
predicted_ms = statistics.median(timings["predicted_ms"] for timings in rounds)
values = {
    "prefill_tokens_per_second": 1000 * len(setting["prompt"]) / prompt_ms,
    "decode_tokens_per_second": 1000 * setting["new_tokens"] / predicted_ms,
    "prefill_tokens_per_cpu_second": len(setting["prompt"]) / prompt_busy,
    "decode_tokens_per_cpu_second": setting["new_tokens"] / decode_busy,
    "bits_per_weight": 8 * setting["gguf_bytes"] / setting["parameters"],
    "peak_mb": probe.peak_megabytes(),
}
probe.write(values, ["xllamacpp"], "the index's wheel is built for any x86-64, without AVX-512")
