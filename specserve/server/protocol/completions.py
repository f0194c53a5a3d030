"""`/v1/completions`: the Structs of request and response; stream chunks are responses, too."""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from specserve.server.parse import convert
from specserve.server.protocol.fields import GenerationFields, TokenId, TopLogprobs
from specserve.server.protocol.prompt_logprobs import PromptEntries
from specserve.server.protocol.usage import Metrics, Usage
from specserve.types import MAX_N, FinishReason, RequestError

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 128

_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        _TOKEN_IDS,
        {"type": "array", "items": _TOKEN_IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}
Prompts = list[str] | list[tuple[int, ...]]


class CompletionRequest(GenerationFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt: Annotated[Any, Meta(extra_json_schema=PROMPT_SCHEMA)]
    echo: bool | None = None
    logprobs: TopLogprobs | None = None

    @property
    def requested_max_tokens(self) -> int | None:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def requested_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def requested_prompt_logprobs(self) -> int | None:
        """What `prompt_logprobs` needs, and `logprobs` with `echo`."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)

    def check(self) -> None:
        super().check()
        num_choices = (self.n or 1) * len(self.prompts())
        if num_choices > MAX_N:
            raise RequestError(
                "n", f"{num_choices} completions asked for, prompts times n; at most {MAX_N}"
            )

    def prompts(self) -> Prompts:
        """The prompts: all texts, or all tuples of token ids. Raises RequestError."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise RequestError("prompt", "expected text, token ids, or a list of either; not empty")
        if type(prompt[0]) is int:  # not a bool
            return [_token_ids("prompt", prompt)]
        if len(prompt) > MAX_PROMPTS:
            raise RequestError("prompt", f"{len(prompt)} prompts; at most {MAX_PROMPTS}")
        if isinstance(prompt[0], str):
            for index, text in enumerate(prompt):
                if not isinstance(text, str):
                    raise RequestError(f"prompt[{index}]", "not a string like the first")
            return prompt
        return [_token_ids(f"prompt[{index}]", ids) for index, ids in enumerate(prompt)]


class CompletionLogprobs(Struct, frozen=True):
    """One entry per token. Different tokens have different names: the token's text,
    `bytes:\\xe4` if that is not a whole character, or `token_id:7` if the text is not unique.

    `top_logprobs` also holds the emitted token, in addition to the N requested if necessary.
    `text_offset` is the position in the choice's text where the token's text begins, or the end of
    the text if a stop string cut the token off. In a stream, an entry is sent once its offset is
    final. With `echo` the entries begin with those of the prompt, the first of which is null.
    """

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[dict[str, float] | None, ...]
    text_offset: tuple[int, ...]


class CompletionChoice(Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: PromptEntries | UnsetType = UNSET
    drafter_ids: tuple[int, ...] | UnsetType = UNSET


class Completion(Struct, frozen=True, kw_only=True):
    """The response, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage | UnsetType | None = UNSET
    metrics: Metrics | UnsetType = UNSET
    obfuscation: str | UnsetType = UNSET


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise RequestError(name, "expected a list of token ids; not empty")
    ids: tuple[int, ...] = convert(value, tuple[TokenId, ...], name)
    return ids
