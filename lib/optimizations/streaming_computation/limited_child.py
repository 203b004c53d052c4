"""The program in a child process of `limited_decoding`: joins a control group before it holds anything, opens a
checkpoint, reads a prompt, and then decodes on request, until its input ends.

Reads one line of JSON; answers with lines of JSON.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Serve one arm."""
    request = json.loads(sys.stdin.readline())
    Path(request["members"]).write_text(str(os.getpid()), encoding="utf-8")

    import torch  # from here on everything belongs to the group

    from lib.measure.timing import workloads
    from lib.optimizations.streaming_computation import method, read_bound

    torch.set_num_threads(request["threads"])
    model = method.open_folder(request["folder"], **request["options"])
    work = workloads.steps(model, torch.tensor(request["prompt"]), request["steps"])
    work()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        before = read_bound.disk_bytes()
        work()
        after = read_bound.disk_bytes()
        read = None if before is None or after is None else after - before
        tokens = None if work.output_BN is None else work.output_BN.tolist()
        print(json.dumps({"disk_bytes": read, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
