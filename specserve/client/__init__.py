"""Python clients of a specserve server. They do not import torch."""

from specserve.client.async_client import AsyncClient
from specserve.client.async_stream import AsyncStream
from specserve.client.errors import (
    APIStatusError,
    AuthenticationError,
    BadRequest,
    ConnectionFailed,
    GenerationFailed,
    NotFound,
    PermissionDenied,
    RateLimited,
    ServerError,
    SpecserveError,
    StreamBroken,
    TimedOut,
    Unavailable,
    UnexpectedAnswer,
)
from specserve.client.request import Options, SpeculationOptions
from specserve.client.sync_client import Client, Stream
from specserve.client.types import (
    Choice,
    Completion,
    Delta,
    DrafterReport,
    Model,
    SpeculationReport,
    SpeculativeDecoding,
    Stats,
    TokenLogprob,
    TopLogprob,
    Usage,
)

__all__ = [
    "APIStatusError",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "BadRequest",
    "Choice",
    "Client",
    "Completion",
    "ConnectionFailed",
    "Delta",
    "DrafterReport",
    "GenerationFailed",
    "Model",
    "NotFound",
    "Options",
    "PermissionDenied",
    "RateLimited",
    "ServerError",
    "SpecserveError",
    "SpeculationOptions",
    "SpeculationReport",
    "SpeculativeDecoding",
    "Stats",
    "Stream",
    "StreamBroken",
    "TimedOut",
    "TokenLogprob",
    "TopLogprob",
    "Unavailable",
    "UnexpectedAnswer",
    "Usage",
]
