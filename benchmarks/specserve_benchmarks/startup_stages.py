"""Starts an engine in this process and prints the seconds of each stage, as a JSON list.

python -m specserve_benchmarks.startup_stages generate|serve TARGET

`generate`: what `specserve generate` does, up to one token. `serve`: what the engine process of a
server does until it is ready. Importing is a stage too, so this module imports nothing else of the
project before.
"""

import gc
import json
import os
import sys
import time
from importlib import import_module


class Clock:
    """Wall and processor seconds by stage; `begin` ends the stage before."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float, float]] = []
        self._name, self._times = "", (0.0, 0.0)

    def begin(self, name: str) -> None:
        now = time.perf_counter(), sum(os.times()[:2])
        if self._name:
            wall, processor = (b - a for a, b in zip(self._times, now, strict=True))
            self.stages.append((self._name, wall, processor))
        self._name, self._times = name, now


def start(clock: Clock, command: str, target: str) -> None:
    clock.begin("importing torch")
    import_module("torch")
    clock.begin("importing the rest")
    import_module(
        {"generate": "specserve.cli.generate", "serve": "specserve.process.engine_main"}[command]
    )
    from specserve.config import load_config
    from specserve.engine.engine import Engine
    from specserve.engine.measure import measure_costs
    from specserve.engine.parts import load_parts
    from specserve.engine.warm_up import warm_up
    from specserve.hub import resolve
    from specserve.text import Tokenizer
    from specserve.types import Request, SamplingParams

    clock.begin("loading the tokenizer")
    directory = resolve(target)
    tokenizer = Tokenizer(directory)
    if command == "generate":
        clock.begin("preparing to encode")
        tokenizer.prepare()
    config = load_config({"target": target})
    parts = load_parts(config, directory, tokenizer, resolve, clock.begin)
    if command == "serve":
        warm_up(parts, clock.begin)
    else:
        measure_costs(parts, clock.begin)
        clock.begin("generating one token")
        engine = Engine(parts)
        engine.submit(Request("one", (1,), SamplingParams(max_tokens=1, seed=0)))
        while engine.has_work:
            engine.step()
    clock.begin("")


if __name__ == "__main__":
    gc.disable()  # as `specserve` does while it loads
    clock = Clock()
    start(clock, *sys.argv[1:])
    print(json.dumps(clock.stages))
