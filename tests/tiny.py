"""Tiny random models on disk, and how tests run an engine over them."""

from collections.abc import Callable

from specserve.engine.engine import Engine
from specserve_evals.engines import output_ids as ids
from specserve_evals.engines import run_requests as run
from specserve_evals.tiny_model import (
    TINY_EOS,
    TINY_VOCAB,
    write_tiny_llama,
    write_tiny_tokenizer,
)

__all__ = ["TINY_EOS", "TINY_VOCAB", "ids", "run", "write_tiny_llama", "write_tiny_tokenizer"]

EngineFactory = Callable[..., Engine]
