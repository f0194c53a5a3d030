"""What a server's answers become: frozen Structs, the same for completions and chats."""

from typing import Final

from msgspec import Struct

TARGET_SOURCE: Final = 0  # the target itself
PREDICTION_SOURCE: Final = 255  # the text given as `prediction`


class TopLogprob(Struct, frozen=True):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    raw: bytes | None = None


class TokenLogprob(Struct, frozen=True):
    """The target's own log-probability of an emitted token, and of the likeliest ones there.

    `token` is a name that no other token has: its text, `bytes:\\xe2\\x80` for a part of a
    character, `token_id:7` where neither would do. `raw` is what it is in UTF-8, if the server
    says so. A completion's `top` has the emitted token as well.
    """

    token: str
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()
    raw: bytes | None = None


class Usage(Struct, frozen=True):
    """Tokens of a request, all of its choices together."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class SpeculativeDecoding(Struct, frozen=True):
    """Speculation over one request. `mean_acceptance_length` 1.0 is plain decoding.

    `acceptance_histogram[a]` counts target passes that accepted `a` drafted tokens.
    """

    mean_acceptance_length: float | None = None  # tokens per target pass
    draft_acceptance_rate: float | None = None
    acceptance_histogram: tuple[int, ...] = ()
    num_spec_steps: int = 0
    num_accepted_draft_tokens: int = 0
    num_draft_tokens: int = 0
    num_spec_tokens: int = 0  # deepest tree


class Stats(Struct, frozen=True):
    """How a request went at the server; None is what the server did not say."""

    time_to_first_token_ms: float | None = None
    generation_time_ms: float | None = None
    queue_time_ms: float | None = None
    mean_itl_ms: float | None = None
    tokens_per_second: float | None = None
    speculative_decoding: SpeculativeDecoding | None = None


class Choice(Struct, frozen=True):
    """One generated sequence."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()  # per token; SpeculationReport.name_of says what they are
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or token id that ended it


class Completion(Struct, frozen=True):
    """A whole answer: `n` choices. The properties speak of the first."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    prompt_ids: tuple[int, ...] = ()
    usage: Usage = Usage()
    stats: Stats = Stats()

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def sources(self) -> tuple[int, ...]:
        return self.choices[0].sources

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
    """A piece of a streamed answer. `usage` and `stats` are on the last one.

    Text may lag behind its tokens: a character or a possible stop string is shown when complete.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()  # per token; SpeculationReport.name_of says what they are
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    index: int = 0  # of the choice
    usage: Usage | None = None
    stats: Stats | None = None


class Model(Struct, frozen=True):
    """A model the server offers."""

    id: str
    created: int = 0  # Unix seconds
    owned_by: str = ""
    max_model_len: int | None = None  # tokens of prompt and output together


class DrafterReport(Struct, frozen=True):
    """One drafter: how many of its tree nodes were verified and accepted, in all and by depth."""

    name: str
    active: bool = True  # False: switched off after failing
    num_failures: int = 0  # calls; a request for which it failed is decoded without it
    num_proposed: int = 0
    num_verified: int = 0
    num_accepted: int = 0
    acceptance_rate: float = 0.0
    verified_by_depth: tuple[int, ...] = ()
    accepted_by_depth: tuple[int, ...] = ()


class SpeculationReport(Struct, frozen=True):
    """What speculation did at a server. Source i + 1 of a token is `drafters[i]`.

    `requests` "all": the counts are of everybody's; "own": of the finished requests of this
    client's API key, which lacks the scope `metrics`, and there are no `sources`.
    """

    drafters: tuple[str, ...]
    requests: str = "all"
    exactness: str = ""
    max_nodes: int = 0  # per sequence and pass
    num_running: int = 0
    num_drafts: int = 0  # passes that had something to verify
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    mean_acceptance_length: float = 0.0
    sources: tuple[DrafterReport, ...] = ()

    def name_of(self, source: int) -> str:
        """What to call a number in `sources`."""
        if source == TARGET_SOURCE:
            return "target"
        if source == PREDICTION_SOURCE:
            return "prediction"
        known = source <= len(self.drafters)
        return self.drafters[source - 1] if known else f"drafter {source}"
