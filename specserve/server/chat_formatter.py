"""Wire format of `/v1/chat/completions`: text deltas to stream chunks or to one response."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from msgspec import UNSET, structs

from specserve.server.encoded import encoded
from specserve.server.protocol.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    TokenLogprob,
    TopLogprob,
)
from specserve.server.protocol.prompt_logprobs import PromptEntry, prompt_entries
from specserve.server.protocol.usage import Metrics, Usage
from specserve.text.text_delta import TextDelta
from specserve.text.token_bytes import TokenBytes
from specserve.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class ChatFormatter:
    """Formats the answer to one request.

    A stream has `first_chunks`, then chunks with one `chunk_choice` per text delta. The single
    response is made of a `choice` per sequence, from all its text deltas and their `logprobs`,
    which is called once per delta, in order.
    """

    answer: ChatChunk  # without choices
    request: ChatRequest
    prompt: tuple[int, ...]  # token ids
    token_bytes: TokenBytes
    prompt_entries: list[PromptEntry] = field(default_factory=list)  # added by `logprobs`

    def first_chunks(self) -> list[ChatChunk]:
        """The role of every choice, before its first delta."""
        delta = ChatDelta("assistant", "")
        choices = [
            ChatChunkChoice(index=index, delta=delta) for index in range(self.request.n or 1)
        ]
        chunks = [structs.replace(self.answer, choices=(choice,)) for choice in choices]
        if self.request.return_token_ids:
            chunks[0] = structs.replace(chunks[0], prompt_token_ids=self.prompt)
        return chunks

    def logprobs(self, delta: TextDelta) -> ChatLogprobs:
        """Their entries are encoded here: all of a response at once would block the event loop."""
        num_top, scores = self.request.prompt_logprobs, delta.tokens.prompt_logprobs
        if num_top is not None and delta.choice == 0:  # they are the same for all choices
            self.prompt_entries.extend(prompt_entries(scores, num_top, self.token_bytes))
        return ChatLogprobs(tuple(encoded(self._token_logprob(each)) for each in delta.logprobs))

    def chunk_choice(self, delta: TextDelta) -> ChatChunkChoice:
        tokens = delta.tokens
        return ChatChunkChoice(
            index=delta.choice,
            delta=ChatDelta(content=delta.text or UNSET),
            logprobs=self.logprobs(delta) if delta.logprobs else None,
            finish_reason=tokens.finish,
            stop_reason=tokens.stop_reason if tokens.finish else UNSET,
            token_ids=tokens.ids if self.request.return_token_ids else UNSET,
            drafter_ids=tokens.drafter_ids if self.request.return_drafter_ids else UNSET,
        )

    def choice(self, deltas: Sequence[TextDelta], logprobs: Sequence[ChatLogprobs]) -> ChatChoice:
        last = deltas[-1].tokens
        assert last.finish is not None
        content = tuple(chain.from_iterable(each.content for each in logprobs))
        return ChatChoice(
            index=deltas[-1].choice,
            message=ChatMessage("".join(delta.text for delta in deltas)),
            logprobs=ChatLogprobs(content) if self.request.logprobs else None,
            finish_reason=last.finish,
            stop_reason=last.stop_reason,
            token_ids=token_ids(deltas) if self.request.return_token_ids else UNSET,
            drafter_ids=drafter_ids(deltas) if self.request.return_drafter_ids else UNSET,
        )

    def response(
        self, choices: Sequence[ChatChoice], usage: Usage, metrics: Metrics
    ) -> ChatCompletion:
        return ChatCompletion(
            id=self.answer.id,
            created=self.answer.created,
            model=self.answer.model,
            choices=tuple(choices),
            usage=usage,
            metrics=metrics,
            prompt_token_ids=self.prompt if self.request.return_token_ids else UNSET,
            prompt_logprobs=tuple(self.prompt_entries) if self.prompt_entries else UNSET,
        )

    def _token_logprob(self, entry: TokenLogprobs) -> TokenLogprob:
        names, num_top = self.token_bytes, self.request.top_logprobs or 0
        top = tuple(
            TopLogprob(names.text(token), logprob, tuple(names.bytes(token)))
            for token, logprob in entry.top[:num_top]
        )
        token = entry.token_id
        return TokenLogprob(names.text(token), entry.logprob, tuple(names.bytes(token)), top)


def token_ids(deltas: Sequence[TextDelta]) -> tuple[int, ...]:
    return tuple(token for delta in deltas for token in delta.tokens.ids)


def drafter_ids(deltas: Sequence[TextDelta]) -> tuple[int, ...]:
    return tuple(drafter_id for delta in deltas for drafter_id in delta.tokens.drafter_ids)
