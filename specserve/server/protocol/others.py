"""Requests and responses of all routes that do not generate text."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from specserve.server.protocol.chat import Messages
from specserve.server.protocol.fields import ModelName, TokenId


class DefaultSampling(Struct, frozen=True):
    """What a request gets that does not give these fields."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float


class Model(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "specserve"
    root: str
    max_model_len: int
    default_sampling_params: DefaultSampling


class ModelList(Struct, frozen=True):
    data: tuple[Model, ...]
    object: Literal["list"] = "list"


class TokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Text or a chat to tokenize: exactly one of `prompt` and `messages`."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeResponse(Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: tuple[int, ...]
    token_strs: tuple[str, ...] | UnsetType = UNSET


class DetokenizeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Meta(max_length=2**20)]


class DetokenizeResponse(Struct, frozen=True):
    prompt: str


class Health(Struct, frozen=True):
    status: Literal["ok", "failed"]
    engine: str


class Readiness(Struct, frozen=True):
    ready: bool
    reason: str | None


class Version(Struct, frozen=True):
    version: str


class DrafterReport(Struct, frozen=True):
    """One drafter: its tree nodes that were verified and accepted, in total and by depth."""

    name: str
    active: bool
    num_failures: int
    num_proposed: int
    num_verified: int
    num_accepted: int
    acceptance_rate: float
    verified_by_depth: tuple[int, ...]
    accepted_by_depth: tuple[int, ...]


class SpeculationReport(Struct, frozen=True, kw_only=True):
    """Totals of speculative decoding. A drafter id i in a choice's `drafter_ids` means: 0 the
    target model, 255 the request's own prediction, else `drafters[i - 1]`.

    With the scope `metrics` the counts cover all requests. Without it they cover the finished
    requests of the caller's own key, and `num_running` and `by_drafter` are left out.
    """

    requests: Literal["all", "own"]
    drafters: tuple[str, ...]
    exactness: Literal["exact", "fast"]
    max_nodes: int
    num_running: int | UnsetType = UNSET
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    mean_acceptance_length: float
    by_drafter: tuple[DrafterReport, ...] | UnsetType = UNSET


class ErrorDetail(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Struct, frozen=True):
    error: ErrorDetail
