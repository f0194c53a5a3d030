"""What a child says and hears: JSON lines on stdin and stdout, one request at a time.

Standard library only: it runs in every peer's environment. Whatever an engine prints goes to
stderr. Invariant: between requests a child waits on stdin and does nothing.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], Prompts]  # prompts, tokens per answer -> answers


def serve(load: Callable[[dict[str, Any]], tuple[Generate, str]]) -> None:
    """`load` takes the settings on the command line and gives `generate` and the version."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    generate, version = load(json.loads(sys.argv[1]))
    ready = {"version": version, "load_s": time.perf_counter() - started}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        tokens = generate(request["prompts"], request["max_tokens"])
        reply = {"tokens": tokens, "seconds": time.perf_counter() - started}
        print(json.dumps(reply), file=answers, flush=True)
