"""`specserve serve`: runs the HTTP server until a signal stops it."""

import argparse
import asyncio
import json
import logging
import os
import sys
from functools import partial
from typing import Final

import uvloop

from specserve import __version__
from specserve.cli.parser import engine_config
from specserve.cli.progress import show_progress
from specserve.config import ConfigError
from specserve.engine.metrics import EngineInfo
from specserve.hub import resolve
from specserve.models.generation_config import describe_sampling
from specserve.server.auth import KEYS_VARIABLE
from specserve.server.lifecycle import serve

_EXAMPLE = {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 60}

# Bytes of a float weight to those of an int8 weight, whose scale takes a sixteenth of a byte. On a
# CPU, reading the weights is most of the time of decoding.
_BYTES_TO_INT8: Final = {"float32": 3.8, "bfloat16": 1.9, "float16": 1.9}


def run(args: argparse.Namespace) -> int:
    config = engine_config(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    with show_progress() as report:
        target = resolve(config.target.target, progress=report)
    # Evaluated here, because `load_keyring` removes the variable from the environment.
    announce = partial(
        _announce, with_keys=bool(config.server.api_key_file) or KEYS_VARIABLE in os.environ
    )
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            answered = runner.run(serve(config, target, announce))
    except OSError as error:
        raise ConfigError(
            f"port: cannot listen on {config.server.host}:{config.server.port} "
            f"({error.strerror}); choose another with --port"
        ) from error
    return 0 if answered else 1


def _announce(url: str, model: str, info: EngineInfo, *, with_keys: bool) -> None:
    """Print what is served and where, and a curl command to try it."""
    exactness = "exact" if info.exact else "fast"
    print(f"specserve {__version__} serves {model} at {url}")
    print(
        f"  {info.device}, weights {info.weights}, K and V {info.kv_dtype}, {exactness}; context "
        f"{info.limits.max_model_len} tokens"
    )
    if info.device == "cpu" and (ratio := _BYTES_TO_INT8.get(info.weights)):
        print(f"  faster: --quantization int8, or a GGUF file, reads {ratio} times fewer bytes")
    print(f"  drafters: {', '.join(info.limits.drafters)}; up to {info.max_nodes} nodes per tree")
    print(f"  sampling defaults: {describe_sampling(info.default_sampling)}")
    print(f"  every route and field: {url}/docs")
    print("try it:")
    key = '-H "Authorization: Bearer $KEY" ' if with_keys else ""
    print(
        f"  curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' "
        f"-d '{json.dumps(_EXAMPLE)}'"
    )
    sys.stdout.flush()
