"""The offline API: an engine in this process, with `generate`, `chat` and `stream`."""

import gc
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Self, Unpack

import msgspec

from specserve.completion import (
    Delta,
    Generation,
    GenerationFailed,
    failed,
    generation,
)
from specserve.config import ENGINE_DEFAULTS, EngineSettings, llm_config
from specserve.engine.engine import Engine
from specserve.engine.measure import measure_costs
from specserve.engine.parts import load_parts
from specserve.field_help import ENGINE_HELP, lists_fields
from specserve.hub import resolve
from specserve.inputs import Conversations, Prompts, as_batch, as_chats, per_prompt
from specserve.shared_engine import RunningSequence, SharedEngine
from specserve.text import Tokenizer
from specserve.types import (
    Prompt,
    Request,
    RequestError,
    SamplingParams,
    SpeculationParams,
    read_prompt,
)


class LLM:
    """A model and an engine, loaded into this process.

    `close`, or the end of a `with` block, releases model and KV memory; after that, all but
    `config`, `tokenizer` and `encode` raise RuntimeError. Several threads may use it: their
    requests share forward passes. `AsyncLLM` has the same methods for asyncio programs.
    """

    @lists_fields(EngineSettings, ENGINE_HELP, ENGINE_DEFAULTS)
    def __init__(
        self,
        target: str | None = None,
        *,
        draft: str | Sequence[str] | None = None,
        config_file: Path | None = None,
        progress: Callable[[str, float], None] | None = None,
        **settings: Unpack[EngineSettings],
    ) -> None:
        """Load the model `target`: an alias, a directory, a .gguf file or a hub id.

        `draft` is one drafter or several, whose trees are merged. A TOML file may hold settings,
        which the arguments override. `progress(stage, fraction)` reports on the download of models.
        Raises ConfigError, DraftError, HubError, ModelError or TokenizerError, all subclasses of
        ValueError, with the fix in the message. The settings and their defaults:
        """
        self.config = llm_config(target, draft, config_file, settings)
        find = partial(resolve, progress=progress)
        directory = find(self.config.target.target)
        self.tokenizer = Tokenizer(directory)
        self.tokenizer.prepare()
        parts = load_parts(self.config, directory, self.tokenizer, find)
        measure_costs(parts)
        self._shared = SharedEngine(Engine(parts))
        self._numbers = count(1)  # of requests

    @property
    def engine(self) -> Engine:
        """The engine. Raises RuntimeError after `close`."""
        return self._shared.engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._shared.engine = engine

    def close(self) -> None:
        """Release the model and the KV cache. Requests in progress raise RuntimeError.

        Further calls have no effect.
        """
        self._shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def default_sampling_params(self) -> SamplingParams:
        """The sampling parameters of a prompt for which none are given.

        temperature, top_k, top_p, min_p and repetition_penalty are those that the model's
        generation_config.json recommends, the others those of `SamplingParams()`.
        """
        return self.engine.parts.default_sampling

    def generate(
        self,
        prompts: Prompts,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculation: SpeculationParams | None = None,
        predictions: str | Sequence[str | None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Generate completions. Returns one Generation per prompt, in order.

        A prompt is text, token ids or chat messages. `sampling` is one value for all prompts or a
        list with one per prompt; None: `default_sampling_params`. `predictions` is an expected
        output text or a list with one or None per prompt; it affects speed, never the output.
        `on_text(index, delta)` is called with each text delta of the first completion of prompt
        `index`. A request that cannot be served has finish_reason "error"; other requests are not
        affected. Raises ValueError if a list has the wrong length.
        """
        batch = as_batch(prompts)
        params = per_prompt("sampling", sampling or self.default_sampling_params, len(batch))
        expected: list[str | None] = per_prompt("predictions", predictions, len(batch))
        jobs = [
            self._prepared(prompt, own, speculation, prediction, index)
            for index, (prompt, own, prediction) in enumerate(
                zip(batch, params, expected, strict=True)
            )
        ]
        sequences = [seq for job in jobs if not isinstance(job, Generation) for seq in job]
        with _gc_frozen(), closing(self._shared.run(sequences)) as running:
            for seq, delta in running:
                if on_text is not None and delta.text and seq.index == 0:
                    on_text(seq.prompt_index, delta.text)
        return [job if isinstance(job, Generation) else _generation(job) for job in jobs]

    def chat(
        self,
        messages: Conversations,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        speculation: SpeculationParams | None = None,
        predictions: str | Sequence[str | None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Answer a conversation, or each of several. Returns one Generation per conversation.

        A conversation is a list of messages such as {"role": "user", "content": "Hello"}, or a
        string, which stands for one user message. The other arguments are those of `generate`.
        """
        return self.generate(
            as_chats(messages),
            sampling,
            speculation=speculation,
            predictions=predictions,
            on_text=on_text,
        )

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        speculation: SpeculationParams | None = None,
        prediction: str | None = None,
    ) -> Generator[Delta, None, None]:
        """Generate the completions of one prompt, and yield their text and tokens as they come.

        The joined text is that of `generate`. The request starts with the first iteration. Leaving
        the loop, or `close` of the generator, ends the request and frees its KV; several streams
        may be open at once. Raises RequestError if the request cannot be served, GenerationFailed
        if the engine fails on it, and RuntimeError after `close` of the LLM.
        """
        ids = self.encode(prompt)
        params = sampling or self.default_sampling_params
        seqs = self._sequences(ids, params, speculation, prediction)
        with closing(self._shared.run(seqs)) as running:
            for _, delta in running:
                if delta.error is not None:
                    raise GenerationFailed(delta.error)
                yield delta

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of a prompt. Raises RequestError if it cannot be encoded."""
        match read_prompt(prompt):
            case str(text):
                return tuple(self.tokenizer.encode(text))
            case list(messages):
                return tuple(self.tokenizer.chat(messages))
            case ids:
                return ids

    def _prepared(
        self,
        prompt: Prompt,
        params: SamplingParams,
        speculation: SpeculationParams | None,
        prediction: str | None,
        prompt_index: int,
    ) -> list[RunningSequence] | Generation:
        """The `n` sequences of one prompt. If it cannot be served, the result that says so."""
        ids: tuple[int, ...] = ()
        try:
            ids = self.encode(prompt)
            return self._sequences(ids, params, speculation, prediction, prompt_index)
        except RequestError as error:
            return failed(ids, error, params)

    def _sequences(
        self,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        speculation: SpeculationParams | None,
        prediction: str | None,
        prompt_index: int = 0,
    ) -> list[RunningSequence]:
        """The `n` sequences of one prompt. Raises RequestError if they cannot be served."""
        params.validate(self.engine.shape.vocab_size)
        speculation = speculation or SpeculationParams()
        if prediction is not None:
            expected = tuple(self.tokenizer.encode(prediction, add_special=False))
            speculation = msgspec.structs.replace(speculation, prediction=expected)
        now = time.monotonic()
        seqs = []
        for index, own in enumerate(params.samples()):
            name = f"request-{next(self._numbers)}"
            request = Request(name, prompt_ids, own, speculation, arrived_at=now)
            self.engine.limits.check(request)
            seqs.append(RunningSequence(request, self.tokenizer, prompt_index, index))
        return seqs


@contextmanager
def _gc_frozen() -> Iterator[None]:
    """Exclude what exists now from garbage collection, which would take 2 to 20 % of the time."""
    if gc.get_freeze_count():  # other code has frozen objects, and `unfreeze` would release those
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _generation(seqs: list[RunningSequence]) -> Generation:
    return generation(seqs[0].request.prompt_ids, [seq.collector for seq in seqs])
