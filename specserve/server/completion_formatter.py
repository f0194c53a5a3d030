"""Wire format of `/v1/completions`: text deltas to stream chunks or to one response."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import msgspec
from msgspec import UNSET

from specserve.server.chat_formatter import drafter_ids, token_ids
from specserve.server.encoded import encoded
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
        # Of a single response, by choice: the deltas without logprobs, and the logprobs of each.
        self._deltas: defaultdict[int, list[TextDelta]] = defaultdict(list)
        self._logprobs: defaultdict[int, list[CompletionLogprobs]] = defaultdict(list)

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
        return self._chunk((self._choice([delta], delta.text, [self._logprobs_of(delta)]),))

    def usage_chunk(self) -> Completion:
        """The last chunk, without choices; it carries the usage."""
        return self._chunk(())

    def add(self, delta: TextDelta) -> None:
        """Take the next delta of a single response and encode its logprobs."""
        logprobs = self._logprobs_of(delta)
        top = tuple(map(encoded, logprobs.top_logprobs))
        self._deltas[delta.choice].append(delta.without_logprobs())
        self._logprobs[delta.choice].append(msgspec.structs.replace(logprobs, top_logprobs=top))

    def choice(self, index: int) -> CompletionChoice:
        """A choice of the single response, once all deltas were added."""
        deltas = self._deltas.pop(index)
        text = self._echo(index) + "".join(delta.text for delta in deltas)
        return self._choice(deltas, text, self._logprobs.pop(index))

    def response(
        self, choices: Sequence[CompletionChoice], usage: Usage, metrics: Metrics
    ) -> Completion:
        """The single response; `choices` are all results of `choice`, in order."""
        return msgspec.structs.replace(
            self._answer, choices=tuple(choices), usage=usage, metrics=metrics
        )

    def _choice(
        self, deltas: Sequence[TextDelta], text: str, logprobs: Sequence[CompletionLogprobs]
    ) -> CompletionChoice:
        index, last = deltas[-1].choice, deltas[-1].tokens
        with_ids = self._request.return_token_ids
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=_join(logprobs) if self._request.logprobs is not None else None,
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

    def _logprobs_of(self, delta: TextDelta) -> CompletionLogprobs:
        return CompletionLogprobs(
            tuple(self._token_bytes.text(entry.token_id) for entry in delta.logprobs),
            tuple(entry.logprob for entry in delta.logprobs),
            tuple(map(self._top, delta.logprobs)),
            delta.offsets,
        )

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, plus the emitted token if it is not among them."""
        top = dict(entry.top)
        top.setdefault(entry.token_id, entry.logprob)
        return {self._token_bytes.text(token): logprob for token, logprob in top.items()}


def _join(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """One value with the entries of all parts."""
    columns = zip(*map(msgspec.structs.astuple, parts), strict=True)
    return CompletionLogprobs(*(tuple(chain.from_iterable(column)) for column in columns))
