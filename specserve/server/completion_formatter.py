"""Wire format of `/v1/completions`: text deltas to stream chunks or to one response."""

from collections.abc import Sequence
from dataclasses import dataclass
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
from specserve.server.protocol.usage import Metrics, Usage
from specserve.text.text_delta import TextDelta
from specserve.text.token_bytes import TokenBytes
from specserve.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class CompletionFormatter:
    """Formats the answer to one request; the methods are those of `ChatFormatter`."""

    answer: Completion  # without choices
    request: CompletionRequest
    prompts: Sequence[tuple[int, ...]]  # token ids
    echoes: Sequence[str]  # the prompts as text; empty strings without `echo`
    token_bytes: TokenBytes

    def first_chunks(self) -> list[Completion]:
        """With `echo`, the prompt of every choice."""
        n = self.request.n or 1
        return [
            structs.replace(
                self.answer,
                choices=(CompletionChoice(index=index, text=self.echoes[index // n]),),
            )
            for index in range(len(self.prompts) * n if self.request.echo else 0)
        ]

    def logprobs(self, delta: TextDelta) -> CompletionLogprobs:
        return CompletionLogprobs(
            tuple(self.token_bytes.text(entry.token_id) for entry in delta.logprobs),
            tuple(entry.logprob for entry in delta.logprobs),
            tuple(encoded(self._top(entry)) for entry in delta.logprobs),
            delta.offsets,
        )

    def chunk_choice(self, delta: TextDelta) -> CompletionChoice:
        return self._choice([delta], [self.logprobs(delta)], echo="")

    def choice(
        self, deltas: Sequence[TextDelta], logprobs: Sequence[CompletionLogprobs]
    ) -> CompletionChoice:
        return self._choice(
            deltas, logprobs, self.echoes[deltas[0].choice // (self.request.n or 1)]
        )

    def response(
        self, choices: Sequence[CompletionChoice], usage: Usage, metrics: Metrics
    ) -> Completion:
        return structs.replace(self.answer, choices=tuple(choices), usage=usage, metrics=metrics)

    def _choice(
        self, deltas: Sequence[TextDelta], logprobs: Sequence[CompletionLogprobs], echo: str
    ) -> CompletionChoice:
        request, index, last = self.request, deltas[-1].choice, deltas[-1].tokens
        prompt = self.prompts[index // (request.n or 1)]
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
            drafter_ids=drafter_ids(deltas) if request.return_drafter_ids else UNSET,
        )

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, plus the emitted token if it is not among them."""
        top = dict(entry.top)
        top.setdefault(entry.token_id, entry.logprob)
        return {self.token_bytes.text(token): logprob for token, logprob in top.items()}
