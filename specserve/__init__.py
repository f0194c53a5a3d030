"""specserve: a serving runtime built around speculative decoding."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from specserve.types import RequestError, SamplingParams, SpeculationParams

# OpenMP threads that spin while they wait for one another cost an idle machine nothing and a busy
# one 20 times its speed. Short spins cost neither; only in force if torch is not imported yet.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

if TYPE_CHECKING:
    from specserve.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "RequestError", "SamplingParams", "SpeculationParams", "__version__"]


def __getattr__(name: str) -> Any:
    """`LLM` brings torch along, so it is imported when it is first used."""
    if name == "LLM":
        return import_module("specserve.llm").LLM
    raise AttributeError(f"module 'specserve' has no attribute {name!r}")
