"""Draws the requests of the soak test from a seed: sampling, speculation, disconnects.

It knows the fields of the API, not how requests are sent. Every request has a sampling seed, so
that the same request sent again must have the same answer.
"""

from collections.abc import Callable
from random import Random
from typing import Any, Final, Literal

from msgspec import Struct

Cut = Literal["sending", "waiting", "first event", "middle"]
CUTS: Final[tuple[Cut, ...]] = ("sending", "waiting", "first event", "middle")
CUT_EVERY: Final = 3  # one request of this many is cut off
MAX_PATIENCE_S: Final = 0.3  # upper bound of `Shot.seconds`
NUM_OPENINGS: Final = 6  # prefixes that prompts share
_TEXT: Final = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from "
    "or had an they which one you were all her she there would their we him been has when who "
    "will no more if out so up said what its about than into them can only other time new some"
)
_WORDS: Final = _TEXT.split()


class Sizes(Struct, frozen=True):
    """Upper bounds of sizes that are drawn at random."""

    max_prompt: int  # characters
    max_tokens: int


class Shot(Struct, frozen=True):
    """One request. `cut` is the point at which the client closes the connection; None for never.

    `seconds` is the delay before a cut by time. `num_events` is the number of events before a
    stream is cut in the middle. An answer that is not a stream is always cut by time.
    """

    path: str
    body: dict[str, Any]
    cut: Cut | None = None
    seconds: float = 0.0
    num_events: int = 0

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def num_choices(self) -> int:
        return int(self.body.get("n", 1))


_SAMPLINGS: Final[tuple[Callable[[Random], dict[str, Any]], ...]] = (
    lambda rng: {"temperature": 0},
    lambda rng: {"temperature": rng.uniform(0.3, 1.5)},
    lambda rng: {"temperature": 0.9, "top_k": rng.randint(1, 50)},
    lambda rng: {"top_p": rng.uniform(0.3, 0.95)},
    lambda rng: {"min_p": rng.uniform(0.01, 0.2)},
)
_EXTRAS: Final[tuple[Callable[[Random], dict[str, Any]], ...]] = (
    lambda rng: {
        "presence_penalty": 0.5,
        "frequency_penalty": rng.uniform(0.1, 0.6),
        "repetition_penalty": 1.1,
    },
    lambda rng: {"logit_bias": {str(rng.randint(32, 126)): rng.choice((-100, -4, 4))}},
    lambda rng: {"stop": rng.choice(("e", ["th", "zq"]))},
    lambda rng: {"n": 2},
    lambda rng: {"logprobs": rng.randint(0, 5)},
)
_SPECULATIONS: Final[tuple[Callable[[Random], dict[str, Any]], ...]] = (
    lambda rng: {},
    lambda rng: {"speculation": {"enabled": False}},
    lambda rng: {"speculation": {"max_nodes": rng.randint(1, 8)}},
    lambda rng: {"prediction": {"type": "content", "content": words(rng, rng.randint(1, 60))}},
)


def draw(seed: int, index: int, sizes: Sizes) -> Shot:
    """Request `index` of the soak test with this seed; depends on the arguments only."""
    rng = Random(f"{seed}/{index}")
    path, body = _question(rng, seed, sizes.max_prompt)
    body |= {
        "seed": rng.getrandbits(32),
        "max_tokens": rng.randint(1, sizes.max_tokens),
        "ignore_eos": rng.random() < 0.5,
        "return_token_ids": True,
    }
    body |= rng.choice(_SAMPLINGS)(rng) | rng.choice(_SPECULATIONS)(rng)
    for extra in rng.sample(_EXTRAS, rng.choice((0, 0, 1, 2))):
        body |= extra(rng)
    if "messages" in body and "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    if rng.random() < 0.6:
        body |= {"stream": True, "stream_options": {"include_usage": rng.random() < 0.5}}
    if index % CUT_EVERY != CUT_EVERY - 1:
        return Shot(path, body)
    seconds = rng.uniform(0, MAX_PATIENCE_S)
    return Shot(path, body, rng.choice(CUTS), seconds, rng.randint(2, 2 + sizes.max_tokens // 2))


def _question(rng: Random, seed: int, max_prompt: int) -> tuple[str, dict[str, Any]]:
    """The path and the prompt: one of the shared prefixes, which may be empty, and its own rest."""
    number = rng.randrange(NUM_OPENINGS)
    opening = words(
        Random(f"{seed}/opening {number}"), max_prompt * number // NUM_OPENINGS * 2 // 3
    )
    text = f"{opening} {words(rng, rng.randint(1, max_prompt // 3))}".strip()
    if rng.random() < 0.5:
        return "/v1/completions", {"prompt": text}
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}


def words(rng: Random, num_chars: int) -> str:
    """Random words, cut to `num_chars` characters."""
    text = ""
    while len(text) < num_chars:
        text += f"{rng.choice(_WORDS)} "
    return text[:num_chars]
