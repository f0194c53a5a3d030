"""The request fields that both generation routes share, each with its type and bounds.

What a field means is said in `server/descriptions.py`. A field that is null counts as not given.
Bounds that depend on the model (token ids, context) are checked by `engine.limits`.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from specserve.config import MAX_MODEL_NAME
from specserve.types import (
    MAX_LOGPROBS,
    MAX_N,
    MAX_SEED,
    RequestError,
    SamplingParams,
    SpeculationParams,
)

MAX_STOP_CHARS = 1024  # characters per stop string
MAX_TOKEN_LIST = 1024  # entries of stop_token_ids and logit_bias

Name = Annotated[str, Meta(max_length=256)]
ModelName = Annotated[str, Meta(max_length=MAX_MODEL_NAME)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[StopText], Meta(max_length=16)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Salt = Annotated[str, Meta(min_length=1, max_length=1024)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class SpeculationOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of speculative decoding; they affect the speed, never the output."""

    enabled: bool | None = None
    max_nodes: Annotated[int, Meta(ge=1, le=64)] | None = None
    drafters: Annotated[list[Name], Meta(min_length=1, max_length=16)] | None = None


class TextPart(Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Prediction(Struct, frozen=True, forbid_unknown_fields=True):
    """Text that the client expects in the answer."""

    type: Literal["content"]
    content: str | Annotated[list[TextPart], Meta(max_length=1024)]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class GenerationFields(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields that `/v1/completions` and `/v1/chat/completions` share."""

    model: ModelName | None = None
    max_tokens: Count | None = None  # 0: nothing is generated, the prompt is computed only
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=MAX_TOKEN_LIST)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop: StopText | Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_TOKEN_LIST)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: TopLogprobs | None = None  # not in a stream
    return_token_ids: bool | None = None
    return_drafter_ids: bool | None = None
    speculation: SpeculationOptions | None = None
    prediction: Prediction | None = None
    cache_salt: Salt | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None
    request_timeout: Annotated[float, Meta(gt=0, le=86400)] | None = None
    # Accepted for compatibility with clients; no effect on the answer.
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None

    def check(self) -> None:
        """Raise `RequestError` for fields that contradict each other, or an empty prediction."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "only allowed when stream is true")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs", "not allowed when stream is true; leave one out")
        if self.prediction is not None and not self.prediction.text:
            raise RequestError("prediction", "its content is empty; leave the field out instead")

    @property
    def requested_prompt_logprobs(self) -> int | None:
        return self.prompt_logprobs

    def sampling(
        self, defaults: SamplingParams, *, max_tokens: int, logprobs: int | None
    ) -> SamplingParams:
        """The sampling parameters; fields that were not given are those of `defaults`."""
        given = {name: getattr(self, name, None) for name in SamplingParams.__struct_fields__}
        given |= {
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "logit_bias": _token_biases(self.logit_bias or {}),
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "prompt_logprobs": self.requested_prompt_logprobs,
        }
        return replace(defaults, **{name: each for name, each in given.items() if each is not None})

    def speculation_params(self, prediction: tuple[int, ...]) -> SpeculationParams:
        wanted = self.speculation or SpeculationOptions()
        drafters = None if wanted.drafters is None else tuple(wanted.drafters)
        return SpeculationParams(
            wanted.enabled is not False, wanted.max_nodes, prediction, drafters
        )


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    parsed = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise RequestError("logit_bias", f"{key[:40]!r} is not a token id; use its number")
        parsed[int(key)] = bias
    return parsed
