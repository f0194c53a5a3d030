"""Wire format of `/v1/chat/completions`: text deltas to stream chunks or to one response."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from specserve.server.generation import Piece
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
from specserve.text.token_bytes import TokenBytes
from specserve.types import TokenLogprobs


class ChatFormat:
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

    def opening(self) -> list[ChatChunk]:
        """The chunks that open a stream: the role of every choice, before its first delta."""
        delta = ChatDelta("assistant", "")
        choices = [
            ChatChunkChoice(index=index, delta=delta) for index in range(self._request.n or 1)
        ]
        chunks = [self._chunk((choice,)) for choice in choices]
        chunks[0] = msgspec.structs.replace(chunks[0], prompt_token_ids=self._prompt)
        return chunks

    def chunk(self, piece: Piece) -> ChatChunk | None:
        """The chunk for one text delta, or None if the delta has nothing to send."""
        bundle = piece.bundle
        shows = self._request.return_token_ids or self._request.return_drafter_ids
        if not (piece.text or bundle.finish or piece.logprobs or (shows and bundle.ids)):
            return None
        choice = ChatChunkChoice(
            index=piece.choice,
            delta=ChatDelta(content=piece.text) if piece.text else ChatDelta(),
            logprobs=self._logprobs(piece.logprobs) if piece.logprobs else None,
            finish_reason=bundle.finish,
            stop_reason=bundle.stop_reason if bundle.finish else UNSET,
            token_ids=bundle.ids if self._request.return_token_ids else UNSET,
            drafter_ids=bundle.drafter_ids if self._request.return_drafter_ids else UNSET,
        )
        return self._chunk((choice,))

    def closing(self) -> ChatChunk:
        """The last chunk, without choices; it carries the usage."""
        return self._chunk(())

    def response(
        self, choices: Sequence[Sequence[Piece]], usage: Usage, metrics: Metrics
    ) -> ChatCompletion:
        return ChatCompletion(
            id=self._answer.id,
            created=self._answer.created,
            model=self._answer.model,
            choices=tuple(map(self._choice, choices)),
            usage=usage,
            metrics=metrics,
            prompt_token_ids=self._prompt,
        )

    def _choice(self, pieces: Sequence[Piece]) -> ChatChoice:
        last = pieces[-1].bundle
        assert last.finish is not None
        logprobs = None
        if self._request.logprobs:
            logprobs = self._logprobs([entry for piece in pieces for entry in piece.logprobs])
        return ChatChoice(
            index=pieces[-1].choice,
            message=ChatMessage("".join(piece.text for piece in pieces)),
            logprobs=logprobs,
            finish_reason=last.finish,
            stop_reason=last.stop_reason,
            token_ids=token_ids(pieces) if self._request.return_token_ids else UNSET,
            drafter_ids=drafter_ids(pieces) if self._request.return_drafter_ids else UNSET,
        )

    def _chunk(self, choices: tuple[ChatChunkChoice, ...]) -> ChatChunk:
        return msgspec.structs.replace(self._answer, choices=choices)

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
        return ChatLogprobs(tuple(map(self._token_logprob, entries)))

    def _token_logprob(self, entry: TokenLogprobs) -> TokenLogprob:
        spelled, num_top = self._token_bytes, self._request.top_logprobs or 0
        top = tuple(
            TopLogprob(spelled.text(token), logprob, tuple(spelled.bytes(token)))
            for token, logprob in entry.top[:num_top]
        )
        token = entry.token_id
        return TokenLogprob(spelled.text(token), entry.logprob, tuple(spelled.bytes(token)), top)


def token_ids(pieces: Sequence[Piece]) -> tuple[int, ...]:
    return tuple(token for piece in pieces for token in piece.bundle.ids)


def drafter_ids(pieces: Sequence[Piece]) -> tuple[int, ...]:
    return tuple(drafter_id for piece in pieces for drafter_id in piece.bundle.drafter_ids)
