"""specserve: a serving runtime built around speculative decoding."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from specserve.types import RequestError, SamplingParams, SpeculationParams

# OpenMP threads that spin while they wait for one another cost an idle machine nothing and a busy
# one 20 times its speed. Short spins cost neither; only in force if torch is not imported yet.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

if TYPE_CHECKING:
    from specserve.client import AsyncClient, Client
    from specserve.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "RequestError",
    "SamplingParams",
    "SpeculationParams",
    "__version__",
]
# `LLM` brings torch along and the clients aiohttp: each is imported when it is first used.
_LAZY: Final = {
    "LLM": "specserve.llm",
    "AsyncClient": "specserve.client",
    "Client": "specserve.client",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'specserve' has no attribute {name!r}")
