"""An engine in this process that several calls and threads use at the same time.

Whoever waits for tokens runs the next step, and every step runs the sequences of all calls.
"""

import gc
import threading
from collections import deque
from collections.abc import Generator, Sequence

import torch

from specserve.completion import Delta, DeltaCollector
from specserve.engine.engine import Engine
from specserve.text import Tokenizer
from specserve.text.output_text import OutputText
from specserve.types import Request, StepOutput


class RunningSequence:
    """One sequence in progress: makes deltas of the outputs of steps.

    `prompt_index` is that of its prompt in the call, `index` its own among the `n` of the prompt.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer, prompt_index: int, index: int
    ) -> None:
        self.request = request
        self.prompt_index = prompt_index
        self.index = index
        self.collector = DeltaCollector(request.sampling)
        self.arrived: Arrived = deque()  # deltas of all sequences of the same call
        self._text = OutputText.of(request, tokenizer)

    def take(self, output: StepOutput) -> None:
        text = self._text.feed(output.ids, output.finish, output.stop_reason)
        delta = Delta.of(text, output, self.index)
        self.collector.add(delta)
        self.arrived.append((self, delta))


Arrived = deque[tuple[RunningSequence, Delta]]


class SharedEngine:
    """Runs sequences for any number of threads. `close` releases the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._turn = threading.Condition()  # for whoever waits for the end of a step
        self._is_stepping = False
        self._running: dict[str, RunningSequence] = {}  # by request id

    @property
    def engine(self) -> Engine:
        """Raises RuntimeError after `close`."""
        if self._engine is None:
            raise RuntimeError("this LLM is closed; make a new one")
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine = engine

    def close(self) -> None:
        """Release the engine; sequences that still run raise RuntimeError in their threads.

        Further calls have no effect.
        """
        with self._turn:
            engine, self._engine = self._engine, None  # so that no further step begins
            self._turn.wait_for(lambda: not self._is_stepping)
            self._running.clear()
        if engine is not None:
            on_gpu = engine.platform.device.type == "cuda"
            del engine
            gc.collect()  # the parts of an engine refer to each other
            if on_gpu:
                torch.cuda.empty_cache()

    def run(
        self, seqs: Sequence[RunningSequence]
    ) -> Generator[tuple[RunningSequence, Delta], None, None]:
        """Run sequences to their end and yield their deltas. Closing it ends the sequences.

        The requests must have been checked by the engine's limits. Raises RuntimeError after
        `close` of the engine.
        """
        arrived: Arrived = deque()
        num_running = len(seqs)
        try:
            for seq in seqs:
                seq.arrived = arrived
                self._running[seq.request.id] = seq
                self.engine.submit(seq.request)
            while num_running:
                self._wait(arrived)
                while arrived:
                    seq, delta = arrived.popleft()
                    num_running -= delta.finish_reason is not None
                    yield seq, delta
        except BaseException as error:
            self._abort(seqs)
            if isinstance(error, GeneratorExit):
                self._free_aborted()
            raise

    def _wait(self, arrived: Arrived) -> None:
        """Return after a step, of this thread or of another one that fills `arrived`."""
        with self._turn:
            self._turn.wait_for(lambda: arrived or not self._is_stepping)
            if arrived:
                return
            engine, self._is_stepping = self.engine, True
        self._step(engine)

    def _step(self, engine: Engine) -> None:
        """Run a step, pass its outputs to their sequences, and let the next thread have its turn.

        Outputs of aborted sequences are ignored.
        """
        try:
            for output in engine.step():
                if (seq := self._running.get(output.id)) is not None:
                    seq.take(output)
                if output.finish is not None:
                    self._running.pop(output.id, None)
        finally:
            with self._turn:
                self._is_stepping = False
                self._turn.notify_all()

    def _abort(self, seqs: Sequence[RunningSequence]) -> None:
        """End those of the sequences that still run, at the next step."""
        for seq in seqs:
            running = self._running.pop(seq.request.id, None)
            if running is not None and self._engine is not None:
                self._engine.abort(seq.request.id)

    def _free_aborted(self) -> None:
        """Free the KV of aborted sequences, unless a step of other sequences will do it."""
        with self._turn:
            if self._engine is None or self._running or self._is_stepping:
                return
            engine, self._is_stepping = self._engine, True
        self._step(engine)
