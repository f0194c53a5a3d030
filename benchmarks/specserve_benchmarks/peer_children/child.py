"""The protocol of a child process: JSON lines on stdin and stdout, one request at a time.

Uses the standard library only, because it runs in the environment of every engine. Anything that an
engine prints goes to stderr. Invariant: between requests a child only waits on stdin.
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
    """Load the engine, report that it is ready, and answer requests until stdin ends.

    `load` takes the settings, JSON on the command line, and returns a `Generate` and the engine's
    version.
    """
    # Replies go to the original stdout; everything else written to stdout goes to stderr.
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
