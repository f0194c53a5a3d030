"""specserve: a serving runtime built around speculative decoding."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from specserve.completion import Completion, Delta, Generation, GenerationFailed
from specserve.types import RequestError, SamplingParams, SpeculationParams

# By default OpenMP threads spin for long while they wait for each other, which made decoding more
# than 20 times slower beside another busy process. A limit of 20000 spins avoids most of that and
# costs nothing on an idle machine (benchmarks/LOG.md). It has no effect once torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

if TYPE_CHECKING:
    from specserve.async_llm import AsyncLLM
    from specserve.client import AsyncClient, Client
    from specserve.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncClient",
    "AsyncLLM",
    "Client",
    "Completion",
    "Delta",
    "Generation",
    "GenerationFailed",
    "RequestError",
    "SamplingParams",
    "SpeculationParams",
    "__version__",
]
# Imported on first use, because `LLM` imports torch and the others import aiohttp or tokenizers.
_LAZY: Final = {
    "LLM": "specserve.llm",
    "AsyncClient": "specserve.client",
    "AsyncLLM": "specserve.async_llm",
    "Client": "specserve.client",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'specserve' has no attribute {name!r}")
