"""Wire format of `/v1/completions`: text deltas to stream chunks or to one response."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from msgspec import UNSET, structs

from specserve.server.chat_formatter import drafter_ids, token_ids
from specserve.server.encoded import encoded
from specserve.server.protocol.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from specserve.server.protocol.prompt_logprobs import PromptEntry, prompt_entries
from specserve.server.protocol.usage import Metrics, Usage
from specserve.text.text_delta import TextDelta
from specserve.text.token_bytes import TokenBytes
from specserve.types import PromptLogprobs, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Echo:
    """The text of a prompt, and per token the offset at which it begins, for logprobs."""

    text: str = ""
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CompletionFormatter:
    """Formats the answer to one request; the methods are those of `ChatFormatter`."""

    answer: Completion  # without choices
    request: CompletionRequest
    prompts: Sequence[tuple[int, ...]]  # token ids
    echoes: Sequence[Echo]  # of the prompts; empty without `echo`
    token_bytes: TokenBytes
    # Added by `logprobs`, by choice: entries for the prompt, and the number of its tokens so far.
    prompt_entries: defaultdict[int, list[PromptEntry]] = field(
        default_factory=lambda: defaultdict(list)
    )
    num_scored: Counter[int] = field(default_factory=Counter)

    def first_chunks(self) -> list[Completion]:
        """With `echo`, the prompt of every choice."""
        num_choices = len(self.prompts) * (self.request.n or 1)
        return [
            structs.replace(
                self.answer,
                choices=(CompletionChoice(index=index, text=self._echo(index).text),),
            )
            for index in range(num_choices if self.request.echo else 0)
        ]

    def logprobs(self, delta: TextDelta) -> CompletionLogprobs:
        choice, scores = delta.choice, delta.tokens.prompt_logprobs
        num_top, echo = self.request.prompt_logprobs, self._echo(choice)
        if num_top is not None:
            entries = prompt_entries(scores, num_top, self.token_bytes)
            self.prompt_entries[choice].extend(entries)
        if not (self.request.echo and scores):
            ids = [entry.token_id for entry in delta.logprobs]
            offsets = tuple(len(echo.text) + offset for offset in delta.offsets)
            return self._columns(ids, delta.logprobs, offsets)
        if self.request.logprobs is None:
            return CompletionLogprobs((), (), (), ())
        part = slice(self.num_scored[choice], self.num_scored[choice] + len(scores))
        self.num_scored[choice] = part.stop
        return self._columns(self._prompt(choice)[part], scores, echo.offsets[part])

    def chunk_choice(self, delta: TextDelta) -> CompletionChoice:
        return self._choice([delta], [self.logprobs(delta)], echo="")

    def choice(
        self, deltas: Sequence[TextDelta], logprobs: Sequence[CompletionLogprobs]
    ) -> CompletionChoice:
        return self._choice(deltas, logprobs, self._echo(deltas[0].choice).text)

    def response(
        self, choices: Sequence[CompletionChoice], usage: Usage, metrics: Metrics
    ) -> Completion:
        return structs.replace(self.answer, choices=tuple(choices), usage=usage, metrics=metrics)

    def _choice(
        self, deltas: Sequence[TextDelta], logprobs: Sequence[CompletionLogprobs], echo: str
    ) -> CompletionChoice:
        request, index, last = self.request, deltas[-1].choice, deltas[-1].tokens
        prompt, entries = self._prompt(index), self.prompt_entries[index]
        # Columns of `CompletionLogprobs`, each joined over the deltas.
        columns = zip(*map(structs.astuple, logprobs), strict=True)
        joined = CompletionLogprobs(*(tuple(chain.from_iterable(each)) for each in columns))
        return CompletionChoice(
            index=index,
            text=echo + "".join(delta.text for delta in deltas),
            logprobs=joined if request.logprobs is not None else None,
            finish_reason=last.finish,
            stop_reason=last.stop_reason,
            token_ids=token_ids(deltas) if request.return_token_ids else UNSET,
            prompt_token_ids=prompt if request.return_token_ids and last.finish else UNSET,
            prompt_logprobs=tuple(entries) if entries else UNSET,
            drafter_ids=drafter_ids(deltas) if request.return_drafter_ids else UNSET,
        )

    def _prompt(self, choice: int) -> tuple[int, ...]:
        return self.prompts[choice // (self.request.n or 1)]

    def _echo(self, choice: int) -> Echo:
        return self.echoes[choice // (self.request.n or 1)]

    def _columns(
        self, ids: Sequence[int], entries: PromptLogprobs, offsets: tuple[int, ...]
    ) -> CompletionLogprobs:
        return CompletionLogprobs(
            tuple(map(self.token_bytes.text, ids)),
            tuple(None if entry is None else entry.logprob for entry in entries),
            tuple(None if entry is None else encoded(self._top(entry)) for entry in entries),
            offsets,
        )

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, plus the token itself if it is not among them."""
        top = dict(entry.top[: self.request.logprobs])
        top.setdefault(entry.token_id, entry.logprob)
        return {self.token_bytes.text(token): logprob for token, logprob in top.items()}
