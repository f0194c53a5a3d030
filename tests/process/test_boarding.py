"""Requests that come within a moment make the next pass, and nobody waits longer than that."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from specserve.process import boarding
from specserve.process.boarding import Boarding
from specserve.process.frames import FrameSocket
from specserve.process.messages import ToEngine
from specserve.types import Abort, Request, SamplingParams

LONG_PASS = 60.0  # seconds: the moment after it is the longest there is
MOMENT_S = 0.5  # longer than in earnest, as a busy machine is slow to send


class Peer:
    """The other end of the engine's socket."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.socks = ours, theirs
        self.frames: FrameSocket[ToEngine] = FrameSocket(ours, ToEngine)
        self.boarding: Boarding[ToEngine] = Boarding(FrameSocket(theirs, ToEngine), idle_s=0.2)
        self.boarding.passed(LONG_PASS)

    def send(self, name: str) -> None:
        self.frames.send(Request(name, (1, 2), SamplingParams()))

    def send_later(self, name: str, seconds: float) -> threading.Timer:
        timer = threading.Timer(seconds, self.send, [name])
        timer.start()
        return timer


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.setattr(boarding, "_MOST_S", MOMENT_S)
    peer = Peer()
    yield peer
    for sock in peer.socks:
        sock.close()


def received(messages: list[ToEngine] | None) -> list[str]:
    assert messages is not None
    return [message.id for message in messages if isinstance(message, Request | Abort)]


def test_a_successor_boards_the_next_pass(peer: Peer) -> None:
    timer = peer.send_later("successor", 0.001)
    assert received(peer.boarding.receive(running=True, places=1)) == ["successor"]
    timer.join()


def test_the_pass_leaves_with_as_many_as_there_are_places(peer: Peer) -> None:
    peer.send("a")
    timer = peer.send_later("too late", MOMENT_S / 2)
    assert received(peer.boarding.receive(running=True, places=1)) == ["a"]
    timer.join()


def test_an_abort_takes_no_place(peer: Peer) -> None:
    peer.frames.send(Abort("gone"))
    timer = peer.send_later("successor", 0.001)
    assert received(peer.boarding.receive(running=True, places=1)) == ["gone", "successor"]
    timer.join()


@pytest.mark.parametrize("last_pass_s", [0.0, LONG_PASS])
def test_nobody_comes_and_the_pass_leaves(peer: Peer, last_pass_s: float) -> None:
    peer.boarding.passed(last_pass_s)
    timer = peer.send_later("late", 10 * MOMENT_S)
    assert received(peer.boarding.receive(running=True, places=4)) == []
    assert received(peer.boarding.receive(running=True, places=0)) == []
    assert timer.is_alive()
    timer.cancel()


def test_a_burst_after_idle_boards_together(peer: Peer) -> None:
    timers = [peer.send_later(str(n), 0.05 + 0.001 * n) for n in range(8)]
    boarded = received(peer.boarding.receive(running=False, places=0))
    assert sorted(boarded) == [str(n) for n in range(8)]  # timers may overtake each other
    for timer in timers:
        timer.join()


def test_an_endless_burst_does_not_hold_the_first(peer: Peer) -> None:
    stop = threading.Event()

    def keep_coming() -> None:
        while not stop.is_set():
            peer.send("more")
            time.sleep(MOMENT_S / 5)

    thread = threading.Thread(target=keep_coming)
    thread.start()
    try:
        assert received(peer.boarding.receive(running=False, places=0))
    finally:
        stop.set()
        thread.join()


def test_only_requests_hold_an_idle_engine(peer: Peer) -> None:
    peer.frames.send(Abort("gone"))
    assert received(peer.boarding.receive(running=False, places=0)) == ["gone"]
    assert received(peer.boarding.receive(running=False, places=0)) == []


@pytest.mark.parametrize("running", [False, True])
def test_the_peer_is_gone(peer: Peer, running: bool) -> None:
    peer.send("last")
    peer.socks[0].close()
    assert peer.boarding.receive(running=running, places=2) is None
