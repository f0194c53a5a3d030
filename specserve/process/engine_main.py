"""The engine's own process: `python -m specserve.process.engine_main FD`, spoken to over FD.

Loads, warms up, then runs the step loop; says so in frames (`messages.py`). It lives as long as
its parent does. What goes wrong with the settings is a `Failed`, with a request a `Refused`;
anything else ends the process, and the parent starts another.
"""

import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from specserve.config import ConfigError
from specserve.drafting.base import DraftError
from specserve.engine.engine import Engine
from specserve.hub import HubError, resolve
from specserve.models.fields import ModelError
from specserve.process.boarding import Boarding
from specserve.process.frames import FrameSocket
from specserve.process.messages import (
    HEARTBEAT_S,
    Configure,
    Failed,
    Loading,
    Ready,
    Refused,
    Stepped,
    ToEngine,
)
from specserve.process.parent import kill_with_parent
from specserve.text import TextError, Tokenizer
from specserve.types import Abort, Request, RequestError, StepOutput

logger = logging.getLogger(__name__)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever runs the parent decides there
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(levelname)s engine: %(message)s"
    )
    sock = socket.socket(fileno=int(sys.argv[1]))
    kill_with_parent()
    threading.Thread(target=_end_with_parent, args=(sock,), daemon=True).start()
    frames: FrameSocket[ToEngine] = FrameSocket(sock, ToEngine)
    try:
        return _serve(frames)
    except ConnectionError:
        return 0  # the parent is gone
    except Exception:
        logger.exception("the engine stops")
        return 1


def _end_with_parent(sock: socket.socket) -> None:
    """The step loop notices too, but not while it loads weights.

    Where `kill_with_parent` does nothing, or came too late, this does. Keeps the socket open to the
    very end, so that its end is the end of the process.
    """
    poll = select.poll()
    poll.register(sock, 0)  # nothing but the end of the connection
    poll.poll()
    os._exit(0)


def _serve(frames: FrameSocket[ToEngine]) -> int:
    while not (messages := frames.receive(None)):
        if messages is None:
            return 0
    configure, *early = messages
    assert isinstance(configure, Configure), "the first message says what to load"
    try:
        engine, slowest_step = _load(configure, _Progress(frames))
    except (ConfigError, DraftError, HubError, ModelError, TextError) as error:
        frames.send(Failed(str(error)))
        return 1
    frames.send(Ready(engine.info(), engine.stats(), slowest_step))
    _take(engine, frames, early)
    boarding, places = Boarding(frames, HEARTBEAT_S), 0
    while (boarded := boarding.receive(running=engine.has_work, places=places)) is not None:
        _take(engine, frames, boarded)
        outputs: list[StepOutput] = []
        if engine.has_work:  # a round without says nothing about the next pass
            started = time.perf_counter()
            outputs = engine.step()
            boarding.passed(time.perf_counter() - started)
        stats = engine.stats()
        frames.send(Stepped(tuple(outputs), stats))
        finished = sum(output.finish is not None for output in outputs)
        places = max(0, finished - stats.num_waiting)
    return 0


def _load(configure: Configure, progress: "_Progress") -> tuple[Engine, float]:
    """A warm engine, and the seconds of its slowest step so far."""
    target = Path(configure.target)
    progress.stage("reading the tokenizer")
    tokenizer = Tokenizer(target)
    engine = Engine(
        configure.config,
        target,
        tokenizer,
        lambda spec: resolve(spec, progress=progress.fraction),
        progress.stage,
    )
    slowest_step = engine.warm_up(progress.stage)
    gc.freeze()  # all this stays: going through it again and again took 1 % of the time
    return engine, slowest_step


def _take(engine: Engine, frames: FrameSocket[ToEngine], messages: list[ToEngine]) -> None:
    for message in messages:
        if isinstance(message, Request):
            try:
                engine.submit(message)
            except RequestError as error:
                frames.send(Refused(message.id, error.param, error.message))
        elif isinstance(message, Abort):
            engine.abort(message.id)


class _Progress:
    """Tells the parent what the start is doing, and so that it is alive."""

    def __init__(self, frames: FrameSocket[ToEngine]) -> None:
        self._frames = frames
        self._told = ""

    def stage(self, stage: str) -> None:
        if stage != self._told:
            self._told = stage
            self._frames.send(Loading(stage))

    def fraction(self, stage: str, fraction: float) -> None:
        self.stage(f"{stage} ({fraction:.0%})")


if __name__ == "__main__":
    sys.exit(main())
