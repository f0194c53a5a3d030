"""Requests that arrive within the delay join the next step, and no step waits longer than that."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from specserve.process import batch_coalescer
from specserve.process.batch_coalescer import BatchCoalescer
from specserve.process.frames import FrameSocket
from specserve.process.messages import ToEngine
from specserve.types import Abort, Request, SamplingParams

LONG_STEP = 60.0  # seconds: the delay after it is the longest there is
DELAY_S = 0.5  # longer than in production, because a busy machine is slow to send


class Peer:
    """The other end of the engine's socket."""

    def __init__(self) -> None:
        our_end, engine_end = socket.socketpair()
        self.socks = our_end, engine_end
        self.frames: FrameSocket[ToEngine] = FrameSocket(our_end, ToEngine)
        frames: FrameSocket[ToEngine] = FrameSocket(engine_end, ToEngine)
        self.coalescer: BatchCoalescer = BatchCoalescer(frames, idle_s=0.2)
        self.coalescer.record_step(LONG_STEP)

    def send(self, name: str) -> None:
        self.frames.send(Request(name, (1, 2), SamplingParams()))

    def send_later(self, name: str, seconds: float) -> threading.Timer:
        timer = threading.Timer(seconds, self.send, [name])
        timer.start()
        return timer

    def receive(self, *, running: bool, num_free_slots: int = 0) -> list[str]:
        """The ids of the requests and aborts that the coalescer receives."""
        messages = self.coalescer.receive(running=running, num_free_slots=num_free_slots)
        assert messages is not None
        return [message.id for message in messages if isinstance(message, Request | Abort)]


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.setattr(batch_coalescer, "_MAX_DELAY_S", DELAY_S)
    peer = Peer()
    yield peer
    for sock in peer.socks:
        sock.close()


def test_a_successor_joins_the_next_step(peer: Peer) -> None:
    timer = peer.send_later("successor", 0.001)
    assert peer.receive(running=True, num_free_slots=1) == ["successor"]
    timer.join()


def test_the_step_starts_when_every_free_slot_has_a_request(peer: Peer) -> None:
    peer.send("a")
    timer = peer.send_later("too late", DELAY_S / 2)
    assert peer.receive(running=True, num_free_slots=1) == ["a"]
    timer.join()


def test_an_abort_does_not_count_as_a_request(peer: Peer) -> None:
    peer.frames.send(Abort("aborted"))
    timer = peer.send_later("successor", 0.001)
    assert peer.receive(running=True, num_free_slots=1) == ["aborted", "successor"]
    timer.join()


@pytest.mark.parametrize("last_step_s", [0.0, LONG_STEP])
def test_the_step_starts_if_no_request_arrives(peer: Peer, last_step_s: float) -> None:
    peer.coalescer.record_step(last_step_s)
    timer = peer.send_later("late", 10 * DELAY_S)
    assert peer.receive(running=True, num_free_slots=4) == []
    assert peer.receive(running=True) == []
    assert timer.is_alive()
    timer.cancel()


def test_a_burst_after_idle_joins_one_step(peer: Peer) -> None:
    timers = [peer.send_later(str(n), 0.05 + 0.001 * n) for n in range(8)]
    received = peer.receive(running=False)
    assert sorted(received) == [str(n) for n in range(8)]  # timers may overtake each other
    for timer in timers:
        timer.join()


def test_an_endless_burst_does_not_block_the_first_request(peer: Peer) -> None:
    stop = threading.Event()

    def keep_sending() -> None:
        while not stop.is_set():
            peer.send("more")
            time.sleep(DELAY_S / 5)

    thread = threading.Thread(target=keep_sending)
    thread.start()
    try:
        assert peer.receive(running=False)
    finally:
        stop.set()
        thread.join()


def test_an_idle_engine_waits_only_after_a_request(peer: Peer) -> None:
    peer.frames.send(Abort("aborted"))
    assert peer.receive(running=False) == ["aborted"]
    assert peer.receive(running=False) == []


@pytest.mark.parametrize("running", [False, True])
def test_a_closed_connection_is_reported(peer: Peer, running: bool) -> None:
    peer.send("last")
    peer.socks[0].close()
    assert peer.coalescer.receive(running=running, num_free_slots=2) is None
