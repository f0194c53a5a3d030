"""Wire format of `/v1/completions`: text deltas to stream chunks or to one response."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from specserve.server.chat_formatter import drafter_ids, token_ids
from specserve.server.protocol.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from specserve.server.protocol.usage import Metrics, Usage
from specserve.text.text_delta import TextDelta
from specserve.text.token_bytes import TokenBytes
from specserve.types import TokenLogprobs


class CompletionFormatter:
    """Formats the answer to one request. `echoes`: the prompts as text, empty without `echo`."""

    def __init__(
        self,
        answer: Completion,
        request: CompletionRequest,
        prompts: Sequence[tuple[int, ...]],
        echoes: Sequence[str],
        token_bytes: TokenBytes,
    ) -> None:
        self._answer = answer  # the id, creation time and model of every chunk, without choices
        self._request = request
        self._prompts = prompts
        self._echoes = echoes
        self._n = request.n or 1
        self._token_bytes = token_bytes

    def first_chunks(self) -> list[Completion]:
        """The chunks that open a stream: with `echo`, the prompt of every choice."""
        if not self._request.echo:
            return []
        return [
            self._chunk((CompletionChoice(index=index, text=self._echo(index)),))
            for index in range(len(self._prompts) * self._n)
        ]

    def delta_chunk(self, delta: TextDelta) -> Completion | None:
        """The chunk for one text delta, or None if the delta has nothing to send."""
        tokens = delta.tokens
        shows_tokens = self._request.return_token_ids or self._request.return_drafter_ids
        if not (delta.text or tokens.finish or delta.logprobs or (shows_tokens and tokens.ids)):
            return None
        return self._chunk((self._choice([delta], delta.text),))

    def usage_chunk(self) -> Completion:
        """The last chunk, without choices; it carries the usage."""
        return self._chunk(())

    def response(
        self, choices: Sequence[Sequence[TextDelta]], usage: Usage, metrics: Metrics
    ) -> Completion:
        return msgspec.structs.replace(
            self._answer,
            choices=tuple(
                self._choice(deltas, self._echo(index) + "".join(delta.text for delta in deltas))
                for index, deltas in enumerate(choices)
            ),
            usage=usage,
            metrics=metrics,
        )

    def _choice(self, deltas: Sequence[TextDelta], text: str) -> CompletionChoice:
        index, last = deltas[-1].choice, deltas[-1].tokens
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = self._logprobs(deltas)
        with_ids = self._request.return_token_ids
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=last.finish,
            stop_reason=last.stop_reason,
            token_ids=token_ids(deltas) if with_ids else UNSET,
            prompt_token_ids=self._prompts[index // self._n] if with_ids and last.finish else UNSET,
            drafter_ids=drafter_ids(deltas) if self._request.return_drafter_ids else UNSET,
        )

    def _echo(self, choice: int) -> str:
        return self._echoes[choice // self._n] if self._request.echo else ""

    def _chunk(self, choices: tuple[CompletionChoice, ...]) -> Completion:
        return msgspec.structs.replace(self._answer, choices=choices)

    def _logprobs(self, deltas: Sequence[TextDelta]) -> CompletionLogprobs:
        entries = [entry for delta in deltas for entry in delta.logprobs]
        return CompletionLogprobs(
            tuple(self._token_bytes.text(entry.token_id) for entry in entries),
            tuple(entry.logprob for entry in entries),
            tuple(map(self._top, entries)),
            tuple(offset for delta in deltas for offset in delta.offsets),
        )

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, plus the emitted token if it is not among them."""
        top = dict(entry.top)
        top.setdefault(entry.token_id, entry.logprob)
        return {self._token_bytes.text(token): logprob for token, logprob in top.items()}
