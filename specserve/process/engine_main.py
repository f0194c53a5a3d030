"""The engine process: `python -m specserve.process.engine_main FD`, with messages over socket FD.

It loads the model, warms up, then runs the step loop and reports each of these in frames
(`messages.py`). It ends with its parent. Unusable settings are reported as `Failed` and invalid
requests as `Refused`; any other error ends the process, and the parent starts a new one.
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
from specserve.engine.engine import Engine
from specserve.engine.parts import load_parts
from specserve.engine.warm_up import warm_up
from specserve.hub import HubError, resolve
from specserve.models.fields import ModelError
from specserve.process.batch_coalescer import BatchCoalescer
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
from specserve.process.parent_death import set_parent_death_signal
from specserve.speculation.drafter import DraftError
from specserve.text import Tokenizer, TokenizerError
from specserve.types import Abort, Request, RequestError, StepOutput

logger = logging.getLogger(__name__)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(levelname)s engine: %(message)s"
    )
    sock = socket.socket(fileno=int(sys.argv[1]))
    set_parent_death_signal()
    threading.Thread(target=_exit_with_parent, args=(sock,), daemon=True).start()
    frames: FrameSocket[ToEngine] = FrameSocket(sock, ToEngine)
    try:
        return _serve(frames)
    except ConnectionError:
        return 0  # the parent has ended
    except Exception:
        logger.exception("the engine stops")
        return 1


def _exit_with_parent(sock: socket.socket) -> None:
    """Exit when the parent closes the socket; runs in its own thread.

    The step loop notices this too, but not while weights are loaded. Needed where
    `set_parent_death_signal` has no effect or was called after the parent ended. The socket stays
    open until the process exits, so that the end of the stream means the end of the process.
    """
    poll = select.poll()
    poll.register(sock, 0)  # no event but the end of the connection
    poll.poll()
    os._exit(0)


def _serve(frames: FrameSocket[ToEngine]) -> int:
    while not (messages := frames.receive(None)):
        if messages is None:
            return 0
    configure, *early = messages
    assert isinstance(configure, Configure), "the first message says what to load"
    try:
        engine, slowest_step = _load(configure, frames)
    except (ConfigError, DraftError, HubError, ModelError, TokenizerError) as error:
        frames.send(Failed(str(error)))
        return 1
    frames.send(Ready(engine.info(), engine.stats(), slowest_step))
    _handle(engine, frames, early)
    coalescer, num_free = BatchCoalescer(frames, HEARTBEAT_S), 0
    while True:
        received = coalescer.receive(running=engine.has_work, num_free_slots=num_free)
        if received is None:
            return 0
        _handle(engine, frames, received)
        outputs: list[StepOutput] = []
        if engine.has_work:  # only steps count for the delay
            started = time.perf_counter()
            outputs = engine.step()
            coalescer.record_step(time.perf_counter() - started)
        stats = engine.stats()
        frames.send(Stepped(tuple(outputs), stats))
        num_finished = sum(output.finish is not None for output in outputs)
        num_free = max(0, num_finished - stats.num_waiting)


def _load(configure: Configure, frames: FrameSocket[ToEngine]) -> tuple[Engine, float]:
    """A warm engine, and the duration of its slowest warm-up step in seconds."""

    def progress(*_: object) -> None:
        frames.send(Loading())

    target = Path(configure.target)
    progress()
    tokenizer = Tokenizer(target)
    parts = load_parts(
        configure.config,
        target,
        tokenizer,
        lambda spec: resolve(spec, progress=progress),
        progress,
    )
    slowest_step = warm_up(parts, progress)
    engine = Engine(parts)
    gc.freeze()  # garbage collection over these permanent objects took 1 % of the time
    gc.enable()
    return engine, slowest_step


def _handle(engine: Engine, frames: FrameSocket[ToEngine], messages: list[ToEngine]) -> None:
    for message in messages:
        if isinstance(message, Request):
            try:
                engine.submit(message)
            except RequestError as error:
                frames.send(Refused(message.id, error.param, error.message))
        elif isinstance(message, Abort):
            engine.abort(message.id)


if __name__ == "__main__":
    sys.exit(main())
