"""Frames are decoded however they are split; anything else is a FrameError."""

import asyncio
import socket
from collections.abc import Callable
from itertools import pairwise

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from specserve.process import frames
from specserve.process.frames import (
    MAX_FRAME,
    FrameDecoder,
    FrameError,
    FrameSocket,
    FrameStream,
    encode_frame,
)
from specserve.process.messages import Loading, ToEngine
from specserve.types import Abort, Request, SamplingParams

LONG = Request("long", tuple(range(400_000)), SamplingParams(seed=1, stop=("\n\n", "é")))
REQUESTS = st.builds(
    Request,
    id=st.text(max_size=5),
    prompt_ids=st.lists(st.integers(0, 2**31), max_size=40).map(tuple),
    sampling=st.builds(
        SamplingParams,
        temperature=st.floats(0, 2),
        seed=st.integers(0, 2**63 - 1),
        logit_bias=st.dictionaries(st.integers(0, 96), st.floats(-100, 100), max_size=3),
    ),
    deadline=st.none() | st.floats(allow_nan=False),
)
MESSAGES = st.lists(st.builds(Abort, id=st.text(max_size=5)) | REQUESTS, max_size=6)


@given(messages=MESSAGES, data=st.data())
def test_any_split_of_the_bytes_gives_the_messages(
    messages: list[ToEngine], data: st.DataObject
) -> None:
    stream = b"".join(map(encode_frame, messages))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
    pieces = [stream[start:end] for start, end in pairwise([0, *cuts, len(stream)])]
    assert [message for piece in pieces for message in decoder.feed(piece)] == messages


@given(st.binary(max_size=64))
def test_garbage_is_a_frame_error(body: bytes) -> None:
    """No byte string is a message by accident, because a message needs its tag."""
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
    with pytest.raises(FrameError, match="not a message"):
        decoder.feed(len(body).to_bytes(4, "big") + body)


def test_a_message_of_the_other_direction_is_a_frame_error() -> None:
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
    with pytest.raises(FrameError, match="Loading"):
        decoder.feed(encode_frame(Loading()))


def test_a_frame_that_is_too_long_is_refused_before_it_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
    with pytest.raises(FrameError, match="longer than"):
        decoder.feed((MAX_FRAME + 1).to_bytes(4, "big"))
    monkeypatch.setattr(frames, "MAX_FRAME", 100)
    with pytest.raises(FrameError, match="longer than 100"):
        encode_frame(LONG)


def test_frame_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames: FrameSocket[ToEngine] = FrameSocket(theirs, ToEngine)
        assert frames.receive(0) == []
        assert frames.receive(0.01) == []
        ours.sendall(encode_frame(Abort("a")) + encode_frame(Abort("b")))
        assert frames.receive(None) == [Abort("a"), Abort("b")]
        ours.close()
        assert frames.receive(None) is None


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_frame_stream(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Messages larger than any buffer in both directions, and a peer that closes."""

    async def talk() -> None:
        ours, theirs = socket.socketpair()
        stream: FrameStream[ToEngine] = await FrameStream.open(ours, ToEngine)
        blocking: FrameSocket[ToEngine] = FrameSocket(theirs, ToEngine)
        stream.send(LONG)
        stream.send(Abort("x"))
        got: list[ToEngine] = []
        while len(got) < 2:
            got += await asyncio.to_thread(lambda: blocking.receive(None) or [])
        assert got == [LONG, Abort("x")]
        sending = asyncio.create_task(asyncio.to_thread(blocking.send, LONG))
        assert await stream.receive() == [LONG]
        await sending
        theirs.close()
        assert await stream.receive() is None
        stream.send(Abort("nobody listens"))
        await stream.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(talk())
