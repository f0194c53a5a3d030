"""Wire format of `/v1/chat/completions`: text deltas to stream chunks or to one response."""

from collections import defaultdict
from collections.abc import Sequence

import msgspec
from msgspec import UNSET

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
from specserve.server.protocol.usage import Metrics, Usage
from specserve.text.text_delta import TextDelta
from specserve.text.token_bytes import TokenBytes
from specserve.types import TokenLogprobs


class ChatFormatter:
    """Formats the answer to one request."""

    def __init__(
        self,
        answer: ChatChunk,
        request: ChatRequest,
        prompt: tuple[int, ...],
        token_bytes: TokenBytes,
    ) -> None:
        self._answer = answer  # a chunk with the id, creation time and model of every chunk
        self._request = request
        self._prompt = prompt if request.return_token_ids else UNSET
        self._token_bytes = token_bytes
        # Of a single response, by choice: the deltas without logprobs, and the encoded logprobs.
        self._deltas: defaultdict[int, list[TextDelta]] = defaultdict(list)
        self._logprobs: defaultdict[int, list[TokenLogprob]] = defaultdict(list)

    def first_chunks(self) -> list[ChatChunk]:
        """The chunks that open a stream: the role of every choice, before its first delta."""
        delta = ChatDelta("assistant", "")
        choices = [
            ChatChunkChoice(index=index, delta=delta) for index in range(self._request.n or 1)
        ]
        chunks = [self._chunk((choice,)) for choice in choices]
        chunks[0] = msgspec.structs.replace(chunks[0], prompt_token_ids=self._prompt)
        return chunks

    def delta_chunk(self, delta: TextDelta) -> ChatChunk | None:
        """The chunk for one text delta, or None if the delta has nothing to send."""
        tokens = delta.tokens
        shows_tokens = self._request.return_token_ids or self._request.return_drafter_ids
        if not (delta.text or tokens.finish or delta.logprobs or (shows_tokens and tokens.ids)):
            return None
        choice = ChatChunkChoice(
            index=delta.choice,
            delta=ChatDelta(content=delta.text) if delta.text else ChatDelta(),
            logprobs=(
                ChatLogprobs(tuple(map(self._token_logprob, delta.logprobs)))
                if delta.logprobs
                else None
            ),
            finish_reason=tokens.finish,
            stop_reason=tokens.stop_reason if tokens.finish else UNSET,
            token_ids=tokens.ids if self._request.return_token_ids else UNSET,
            drafter_ids=tokens.drafter_ids if self._request.return_drafter_ids else UNSET,
        )
        return self._chunk((choice,))

    def usage_chunk(self) -> ChatChunk:
        """The last chunk, without choices; it carries the usage."""
        return self._chunk(())

    def add(self, delta: TextDelta) -> None:
        """Take the next delta of a single response and encode its logprobs."""
        self._deltas[delta.choice].append(delta.without_logprobs())
        self._logprobs[delta.choice] += [
            encoded(self._token_logprob(entry)) for entry in delta.logprobs
        ]

    def choice(self, index: int) -> ChatChoice:
        """A choice of the single response, once all deltas were added."""
        deltas = self._deltas.pop(index)
        last = deltas[-1].tokens
        assert last.finish is not None
        logprobs = ChatLogprobs(tuple(self._logprobs.pop(index, ())))
        return ChatChoice(
            index=index,
            message=ChatMessage("".join(delta.text for delta in deltas)),
            logprobs=logprobs if self._request.logprobs else None,
            finish_reason=last.finish,
            stop_reason=last.stop_reason,
            token_ids=token_ids(deltas) if self._request.return_token_ids else UNSET,
            drafter_ids=drafter_ids(deltas) if self._request.return_drafter_ids else UNSET,
        )

    def response(
        self, choices: Sequence[ChatChoice], usage: Usage, metrics: Metrics
    ) -> ChatCompletion:
        """The single response; `choices` are all results of `choice`, in order."""
        return ChatCompletion(
            id=self._answer.id,
            created=self._answer.created,
            model=self._answer.model,
            choices=tuple(choices),
            usage=usage,
            metrics=metrics,
            prompt_token_ids=self._prompt,
        )

    def _chunk(self, choices: tuple[ChatChunkChoice, ...]) -> ChatChunk:
        return msgspec.structs.replace(self._answer, choices=choices)

    def _token_logprob(self, entry: TokenLogprobs) -> TokenLogprob:
        names, num_top = self._token_bytes, self._request.top_logprobs or 0
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
