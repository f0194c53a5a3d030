"""The results of the clients: frozen Structs, the same for completions and chats."""

from typing import Final

from msgspec import Struct

# Drafter ids with a fixed meaning.
TARGET_ID: Final = 0  # the target model itself
PREDICTION_ID: Final = 255  # the `prediction` of the request


class TopLogprob(Struct, frozen=True):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    raw: bytes | None = None


class TokenLogprob(Struct, frozen=True):
    """The log-probability of an emitted token, and in `top` the most likely tokens there.

    The values are those of the target model before sampling parameters apply. `token` is a unique
    name: the token's text; `bytes:\\xe2\\x80` if its bytes are not whole characters; `token_id:7`
    if neither is unique. `raw` holds the bytes of the token; None in completions, and if the server
    does not send them. In completions `top` always includes the emitted token.
    """

    token: str
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()
    raw: bytes | None = None


class Usage(Struct, frozen=True):
    """Token counts of a request, over all of its choices."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class SpeculativeDecoding(Struct, frozen=True):
    """Speculative decoding over one request."""

    mean_acceptance_length: float | None = None  # tokens per forward pass; plain decoding: 1.0
    draft_acceptance_rate: float | None = None
    acceptance_histogram: tuple[int, ...] = ()  # [a]: forward passes with a accepted tokens
    num_spec_steps: int = 0
    num_accepted_draft_tokens: int = 0
    num_draft_tokens: int = 0  # verified tree nodes
    num_spec_tokens: int = 0  # longest path that the node budget of a tree allows


class Stats(Struct, frozen=True):
    """Statistics of a request; None: not measured or not sent by the server."""

    time_to_first_token_ms: float | None = None
    generation_time_ms: float | None = None
    queue_time_ms: float | None = None
    mean_itl_ms: float | None = None  # mean gap between token chunks
    tokens_per_second: float | None = None  # since the arrival of the request
    speculative_decoding: SpeculativeDecoding | None = None


class Choice(Struct, frozen=True):
    """One generated sequence."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    drafter_ids: tuple[int, ...] = ()  # drafter id per token; see SpeculationReport.name_of
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or token id that ended it


class Completion(Struct, frozen=True):
    """A whole answer with its `n` choices. The properties are those of the first choice."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    prompt_ids: tuple[int, ...] = ()
    # One per prompt token, None for the first; empty if they were not requested.
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    usage: Usage = Usage()
    stats: Stats = Stats()

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def drafter_ids(self) -> tuple[int, ...]:
        return self.choices[0].drafter_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        return self.choices[0].stop_reason


class Delta(Struct, frozen=True):
    """A part of a streamed answer. The last one has `usage` and `stats`.

    Text may arrive later than its tokens: an incomplete character, or text that may be the
    beginning of a stop string, is held back.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    drafter_ids: tuple[int, ...] = ()  # drafter id per token; see SpeculationReport.name_of
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    index: int = 0  # of the choice
    usage: Usage | None = None
    stats: Stats | None = None


class Model(Struct, frozen=True):
    """A model of the server."""

    id: str
    created: int = 0  # Unix seconds
    owned_by: str = ""
    max_model_len: int | None = None  # tokens of prompt and output together
    # What requests get that do not give these parameters, by name.
    default_sampling_params: dict[str, float] = {}


class DrafterReport(Struct, frozen=True):
    """One drafter: its verified and accepted tree nodes. Index d of a tuple is depth d + 1."""

    name: str
    active: bool = True  # False: switched off after repeated failures
    num_failures: int = 0  # failed calls; requests for which it fails are decoded without it
    num_proposed: int = 0  # nodes, before the trees of several drafters are merged
    num_verified: int = 0
    num_accepted: int = 0
    acceptance_rate: float = 0.0
    verified_by_depth: tuple[int, ...] = ()
    accepted_by_depth: tuple[int, ...] = ()


class SpeculationReport(Struct, frozen=True):
    """Totals of speculative decoding at a server. The drafter id of `drafters[i]` is i + 1.

    With `requests` "all", the counts cover all requests; `by_drafter` has a report per drafter and
    a last one for predictions. With "own", because the API key lacks the scope `metrics`, they
    cover the finished requests of this key, and `num_running` and `by_drafter` are not sent.
    """

    drafters: tuple[str, ...]
    requests: str = "all"
    exactness: str = ""
    max_nodes: int = 0  # per sequence and forward pass, root included
    num_running: int = 0
    num_drafts: int = 0  # forward passes of a sequence that verified drafted nodes
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    mean_acceptance_length: float = 0.0
    by_drafter: tuple[DrafterReport, ...] = ()

    def name_of(self, drafter_id: int) -> str:
        """The name of a drafter id, such as in `Choice.drafter_ids`."""
        if drafter_id == TARGET_ID:
            return "target"
        if drafter_id == PREDICTION_ID:
            return "prediction"
        known = drafter_id <= len(self.drafters)
        return self.drafters[drafter_id - 1] if known else f"drafter {drafter_id}"
