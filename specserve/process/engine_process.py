"""Supervises the engine process for the HTTP process: starts, watches and restarts it.

Invariant: however the engine ends, every stream ends too, with its last output or with
EngineUnavailable. It does not know HTTP or text. It runs in one event loop; times are monotonic.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from math import inf
from pathlib import Path
from typing import Final, Literal

import msgspec

from specserve.config import EngineConfig
from specserve.engine.metrics import EngineInfo, EngineStats
from specserve.process.child import Child
from specserve.process.messages import (
    Configure,
    Failed,
    FromEngine,
    Ready,
    Refused,
    Stepped,
    ToEngine,
)
from specserve.types import Abort, Request, RequestError, StepOutput

MAX_STARTS: Final = 5  # failed starts, of an engine that has never been ready, before giving up
_MODULE: Final = "specserve.process.engine_main"
_TICK_S: Final = 0.25  # seconds; the unit in which the engine's silence is counted
_HEALTHY_S: Final = 60.0  # seconds that an engine must stay ready to reset the restart delay
_MAX_DELAY_S: Final = 30.0  # seconds; upper bound of the restart delay, which doubles
_KILL_AFTER_S: Final = 2.0  # seconds from asking a process to end until it is killed
_MAX_SLOWDOWN: Final = 3.0  # how much slower than in the warm-up a step may be: a busy machine

logger = logging.getLogger(__name__)
_decoder: Final = msgspec.msgpack.Decoder(ToEngine)
State = Literal["starting", "ready", "restarting", "failed", "stopped"]
_REASONS: Final = {
    "starting": "the engine is starting",
    "restarting": "the engine stopped; it is being restarted",
    "failed": "the engine could not be started",
    "stopped": "the engine has been stopped",
}


class EngineUnavailable(Exception):
    """There is no ready engine. The message is for clients; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailed(ValueError):
    """The engine cannot be started with these settings; the message says why."""


class EngineProcess:
    """One engine, in a child process that is replaced when it ends or hangs."""

    def __init__(
        self,
        config: EngineConfig,
        target: Path,
        *,
        heartbeat_timeout: float = 30.0,
        start_timeout: float = 600.0,
    ) -> None:
        """`target` is the model directory; both timeouts are seconds without a message.

        A ready engine counts as hung after `heartbeat_timeout` plus the time that a step may take,
        a starting one after `start_timeout`, which also bounds the former (see `_allowed_silence`).
        """
        self.state: State = "stopped"
        self.info: EngineInfo | None = None  # of the latest engine that became ready
        self.stats: EngineStats | None = None  # of the current engine
        self.num_restarts = 0
        self.on_stats: Callable[[EngineStats], None] = lambda stats: None
        self._configure = Configure(config, str(target))
        self._heartbeat_timeout = heartbeat_timeout
        self._start_timeout = start_timeout
        self._start_s = 5.0  # duration of the latest start; before it, an estimate
        self._starts_at, self._ready_at = 0.0, inf
        self._settings_error = ""  # error that the latest engine reported about its settings
        self._error = ""  # why the state is "failed"
        self._child: Child[FromEngine] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._start_decided = asyncio.Event()  # set while ready, failed or stopped
        self._start_decided.set()
        self._streams: dict[str, asyncio.Queue[StepOutput | Exception]] = {}
        self._context_lengths: dict[str, int] = {}  # by request: tokens so far
        self._slowest_step = 0.0  # seconds, in the warm-up

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.process.pid

    @property
    def num_open_streams(self) -> int:
        """Number of requests in the engine whose `stream` is open."""
        return len(self._streams)

    async def start(self) -> None:
        """Start the engine and return at once; `wait_ready` waits for it."""
        assert self._supervisor is None, "started already"
        self.info, self._error, self.num_restarts = None, "", 0
        self._set_state("starting")
        self._supervisor = asyncio.create_task(self._supervise())

    async def wait_ready(self) -> EngineInfo:
        """Wait until the engine is ready.

        Raises EngineFailed if it cannot be started, EngineUnavailable if it is stopped meanwhile.
        """
        while True:
            await self._start_decided.wait()
            if self.state == "failed":
                raise EngineFailed(self._error)
            if self.state in ("ready", "stopped"):
                return self.ready_info()

    def ready_info(self) -> EngineInfo:
        """The properties of the ready engine. Raises EngineUnavailable if there is none."""
        if self.state != "ready" or self.info is None:
            raise self._unavailable()
        return self.info

    async def stop(self) -> None:
        """End the engine, its process and the supervising task; open streams fail."""
        self._set_state("stopped")
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
            self._supervisor = None

    async def stream(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """The outputs of a request, up to the one that finishes it. Closing earlier aborts it.

        Use with `contextlib.aclosing`. `request.deadline` has the same meaning in the engine
        process: on Linux all processes share the monotonic clock. Raises RequestError if the
        request cannot be served, EngineUnavailable if the engine is not ready or ends.
        """
        child = self._child
        if self.state != "ready":
            raise self._unavailable()
        assert child is not None
        if request.id in self._context_lengths:
            raise RequestError("id", f"{request.id!r} is already running; use a fresh one")
        _check_encodable(request)
        outputs: asyncio.Queue[StepOutput | Exception] = asyncio.Queue()
        self._streams[request.id] = outputs
        self._context_lengths[request.id] = len(request.prompt_ids)
        child.frames.send(request)
        try:
            while True:
                output = await outputs.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.finish is not None:
                    return
        finally:
            if self._streams.get(request.id) is outputs:
                del self._streams[request.id]
                child.frames.send(Abort(request.id))

    async def _supervise(self) -> None:
        delay = 0.0
        while True:
            end = await self._run()
            if self.info is None and (self._settings_error or self.num_restarts + 1 == MAX_STARTS):
                self._error = self._settings_error or (
                    f"the engine process failed to start {MAX_STARTS} times: {end}; see its log"
                )
                self._set_state("failed")
                return
            if time.monotonic() - self._ready_at > _HEALTHY_S:
                delay = 0.0
            logger.error("the engine process ended (%s); a new one starts in %g s", end, delay)
            self._starts_at = time.monotonic() + delay
            await asyncio.sleep(delay)
            delay = min(max(1.0, 2 * delay), _MAX_DELAY_S)
            self.num_restarts += 1

    async def _run(self) -> str:
        """Run one engine process from start to end; returns how it ended, in words."""
        self._settings_error = ""
        self._starts_at, self._ready_at = time.monotonic(), inf
        try:
            child: Child[FromEngine] = await Child.start(_MODULE, FromEngine)
        except OSError as error:
            return str(error)
        self._child = child
        try:
            child.frames.send(self._configure)
            await self._listen(child)
        except Exception:
            logger.exception("the engine process sent an invalid message")
            child.process.kill()
        except asyncio.CancelledError:
            child.process.terminate()
            raise
        finally:
            self._child = self.stats = None
            if self.state != "stopped":
                self._set_state("starting" if self.info is None else "restarting")
            self._fail_streams()
            code = await child.reap(_KILL_AFTER_S)
        return self._settings_error or (f"signal {-code}" if code < 0 else f"exit code {code}")

    async def _listen(self, child: Child[FromEngine]) -> None:
        """Handle messages until the stream ends; kill an engine that is silent for too long.

        Silence is counted in ticks of this loop, so that time in which this process itself was
        suspended does not count.
        """
        silent_s = 0.0
        while True:
            try:
                async with asyncio.timeout(_TICK_S):
                    messages = await child.frames.receive()
            except TimeoutError:
                silent_s += _TICK_S
                if silent_s >= self._allowed_silence():
                    logger.error("no message from the engine for %g s; killing it", silent_s)
                    child.process.kill()
                    return
                continue
            if messages is None:
                return
            silent_s = 0.0
            for message in messages:
                self._handle(message)

    def _allowed_silence(self) -> float:
        """Seconds that the engine may be silent; it sends messages only between two steps.

        A token's cost is a constant plus a part proportional to its context length. The largest
        warm-up step ran n = `max_num_batched_tokens` tokens, whose context was n / 2 on average.
        With contexts of c tokens a step may hence take 1 + 2c / n times as long.
        """
        if self.state != "ready":
            return self._start_timeout
        if not self._context_lengths:
            return self._heartbeat_timeout
        rows = self._configure.config.schedule.max_num_batched_tokens
        factor = 1 + 2 * max(self._context_lengths.values()) / rows
        allowed = self._heartbeat_timeout + _MAX_SLOWDOWN * self._slowest_step * factor
        return min(allowed, max(self._heartbeat_timeout, self._start_timeout))

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Ready():
                self.info, self._ready_at = message.info, time.monotonic()
                self._start_s = self._ready_at - self._starts_at
                self._slowest_step = message.slowest_step
                self._record_stats(message.stats)
                self._set_state("ready")
            case Failed():
                self._settings_error = message.error
            case Refused():
                error = RequestError(message.param, message.message)
                self._deliver(message.id, error, last=True)
            case Stepped():
                self._record_stats(message.stats)
                for output in message.outputs:
                    if output.id in self._context_lengths:
                        self._context_lengths[output.id] += len(output.ids)
                    self._deliver(output.id, output, last=output.finish is not None)

    def _record_stats(self, stats: EngineStats) -> None:
        self.stats = stats
        try:
            self.on_stats(stats)
        except Exception:
            logger.exception("the engine's statistics could not be recorded")

    def _deliver(self, request_id: str, output: StepOutput | Exception, *, last: bool) -> None:
        """Pass an output to the request's stream, or drop it if the stream is closed."""
        if request_id in self._streams:
            self._streams[request_id].put_nowait(output)
        if last:
            self._streams.pop(request_id, None)
            self._context_lengths.pop(request_id, None)

    def _fail_streams(self) -> None:
        for outputs in self._streams.values():
            outputs.put_nowait(self._unavailable())
        self._streams.clear()
        self._context_lengths.clear()

    def _set_state(self, state: State) -> None:
        self.state = state
        if state in ("starting", "restarting"):
            self._start_decided.clear()
        else:
            self._start_decided.set()

    def _unavailable(self) -> EngineUnavailable:
        left = max(1.0, self._starts_at + self._start_s - time.monotonic())
        over = self.state in ("failed", "stopped")
        return EngineUnavailable(_REASONS[self.state], _MAX_DELAY_S if over else left)


def _check_encodable(request: Request) -> None:
    """Raise RequestError if the engine could not decode the request, which would end the engine."""
    try:
        _decoder.decode(msgspec.msgpack.encode(request))
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestError("request", f"it cannot be sent to the engine: {error}") from error
