"""`prompt_logprobs` of a response, in vLLM's form."""

from collections.abc import Iterator

from msgspec import Struct

from specserve.server.encoded import encoded
from specserve.text.token_bytes import TokenBytes
from specserve.types import PromptLogprobs


class PromptLogprob(Struct, frozen=True):
    """`rank` 1 is the most likely token; null for the prompt's token if it is not among the N most
    likely ones that were requested."""

    logprob: float
    rank: int | None
    decoded_token: str


# Of one token of the prompt: the logprobs of this token and of the N most likely ones, by token id,
# this one first; null for the first token of the prompt.
PromptEntry = dict[str, PromptLogprob] | None
PromptEntries = tuple[PromptEntry, ...]


def prompt_entries(
    logprobs: PromptLogprobs, num_top: int, names: TokenBytes
) -> Iterator[PromptEntry]:
    """One encoded entry per prompt token. At most `num_top` of the most likely tokens are named."""
    for entry in logprobs:
        if entry is None:
            yield None
            continue
        top = dict(entry.top[:num_top])
        ranks = {token: rank for rank, token in enumerate(top, start=1)}
        yield encoded(
            {
                str(token): PromptLogprob(logprob, ranks.get(token), names.text(token))
                for token, logprob in {entry.token_id: entry.logprob, **top}.items()
            }
        )
