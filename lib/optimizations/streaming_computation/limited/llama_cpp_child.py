"""The program that decodes a GGUF file with llama.cpp, weights mapped, in a child process of `children`."""

import json
import urllib.request
from collections.abc import Mapping
from typing import Any

from lib.optimizations.streaming_computation.limited.serving import Decode, Decoded, serve, settle

ROOM = 32  # spare positions of the cache besides prompt and answer
ASKED = {"temperature": 0, "top_k": 1, "samplers": ["top_k"], "ignore_eos": True, "return_tokens": True}


def opened(request: Mapping[str, Any]) -> tuple[Decode, int]:
    """Open the file and read the prompt; return the decode function, and 0: no weights are in private memory.

    From the second call, llama.cpp has all but the last token of the prompt in its cache, so it makes as many passes as
    tokens. The seconds come from its own clock, which excludes its server.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["path"]
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.no_extra_bufts = True  # these would copy some weights into another layout
    params.n_ctx = len(request["prompt"][0]) + request["steps"] + ROOM
    params.n_parallel, params.n_gpu_layers = 1, 0
    params.warmup = params.fit_params = False
    params.cache_ram_mib = params.n_ctx_checkpoints = 0
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads = request["threads"]
    server, opener = xllamacpp.Server(params), urllib.request.build_opener(urllib.request.ProxyHandler({}))
    prompt = {"prompt": request["prompt"][0], "n_predict": request["steps"], "cache_prompt": True}

    def decode() -> Decoded:
        body = json.dumps(ASKED | prompt).encode()
        headers = {"Content-Type": "application/json"}
        completion = urllib.request.Request(f"{server.listening_address}/completion", body, headers)
        with opener.open(completion) as answer:
            content = json.loads(answer.read())
        timings = content["timings"]
        return Decoded(content["tokens"], (timings["prompt_ms"] + timings["predicted_ms"]) / 1000)

    settle(decode)
    return decode, 0


if __name__ == "__main__":
    serve(opened)
