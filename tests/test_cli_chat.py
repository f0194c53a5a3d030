"""`specserve chat` in real processes, with pipes and pseudo-terminals."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from scripted_peer import (
    DONE,
    Handler,
    ScriptedPeer,
    answers,
    endless,
    fails,
    scripted_peer,
    streams,
)

from specserve.cli.chat_screen import DrafterRuns
from specserve.client import Delta, TokenLogprob

MODELS = {"data": [{"id": "tiny", "max_model_len": 512}]}
REPORT = {"drafters": ["ngram"], "by_drafter": []}
METRICS = {
    "time_to_first_token_ms": 12.4,
    "tokens_per_second": 99.96,
    "speculative_decoding": {
        "mean_acceptance_length": 2.5,
        "num_accepted_draft_tokens": 3,
        "num_draft_tokens": 4,
    },
}


def piece(text: str, **more: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "delta": {"content": text}, **more}]}


def server(**special: Handler) -> Handler:
    """A server that answers "you said <prompt>"; `special` has handlers for some prompts."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return await answers(MODELS)(request)
        if request.path == "/v1/speculation":
            return await answers(REPORT)(request)
        prompt = (await request.json())["messages"][-1]["content"]
        if prompt in special:
            return await special[prompt](request)
        usage = {"choices": [], "usage": {"completion_tokens": 4}, "metrics": METRICS}
        said = piece("you ", drafter_ids=[0]), piece(f"said {prompt}", drafter_ids=[1, 1, 255])
        return await streams(*said, usage, DONE)(request)

    return handler


def said(peer: ScriptedPeer) -> list[list[tuple[str, str]]]:
    """(role, content) of the messages of every chat request."""
    return [
        [(message["role"], message["content"]) for message in body["messages"]]
        for body in peer.bodies
        if body is not None
    ]


def chat(lines: str, *arguments: str, **env: str) -> tuple[int, str, str]:
    """Run a chat with pipes; returns exit code, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "specserve.cli", "chat", *arguments],
        input=lines,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | env,
    )
    return done.returncode, done.stdout, done.stderr


class Terminal:
    """A chat at the other end of a pseudo-terminal."""

    def __init__(self, process: subprocess.Popen[bytes], screen: int) -> None:
        self.process = process
        self._screen = screen
        self._seen = b""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def interrupt(self, pattern: str) -> None:
        """Ctrl-C, repeated if necessary: Python misses one just before it reads a key."""
        for _ in range(4):
            self.type("\x03")
            with suppress(AssertionError):
                self.wait_for(pattern, 5)
                return
        raise AssertionError(self._seen)

    def wait_for(self, pattern: str, seconds: float = 20) -> str:
        """Wait for the pattern; returns the output up to its end, which is consumed."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern.encode(), self._seen)):
            assert time.monotonic() < end, self._seen
            if select.select([self._screen], [], [], 0.1)[0]:
                try:
                    self._seen += os.read(self._screen, 65536)
                except OSError:  # how a terminal says that nobody is there any more
                    end = 0
        text, self._seen = self._seen[: match.end()], self._seen[match.end() :]
        return text.decode()


@contextmanager
def terminal(url: str, *arguments: str) -> Iterator[Terminal]:
    screen, inner = pty.openpty()

    def own_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-m", "specserve.cli", "chat", url, *arguments],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env=os.environ | {"TERM": "xterm-256color", "NO_COLOR": "", "COLUMNS": "40"},
        preexec_fn=own_the_terminal,
    )
    os.close(inner)
    try:
        yield Terminal(process, screen)
    finally:
        process.kill()
        process.wait()
        os.close(screen)


# --- through pipes


def test_each_input_line_is_a_turn() -> None:
    with scripted_peer(server()) as peer:
        line = [
            peer.url,
            "--system",
            "be kind",
            "--temperature",
            "0",
            "--stop",
            "x",
            "--top-k",
            "5",
        ]
        assert chat("one\n\ntwo", *line) == (0, "you said one\nyou said two\n", "")
        first, second = said(peer)
        body = peer.bodies[-1]
    assert first == [("system", "be kind"), ("user", "one")]
    assert second == [*first, ("assistant", "you said one"), ("user", "two")]
    assert (body["temperature"], body["stop"], body["top_k"]) == (0, ["x"], 5)
    assert not {"model", "max_tokens", "logprobs", "n"} & body.keys()


def test_commands() -> None:
    lines = [
        *(
            "/stats",
            "/retry",
            "a",
            "/retry",
            "/system be brief",
            "b",
            "/stats",
            "/clear",
            "/system",
        ),
        *("c", "/nonsense", " /text", "/help", "/exit", "never"),
    ]
    with scripted_peer(server()) as peer:
        status, out, err = chat("\n".join(lines), peer.url, "--max-tokens", "7")
        requests = said(peer)
        assert peer.bodies[-1]["max_tokens"] == 7
    assert (status, out.split("\n")) == (
        0,
        [f"you said {x}" for x in ("a", "a", "b", "c", "/text")] + [""],
    )
    answer_a, answer_b = ("assistant", "you said a"), ("assistant", "you said c")
    assert requests == [
        [("user", "a")],
        [("user", "a")],
        [("system", "be brief"), ("user", "a"), answer_a, ("user", "b")],
        [("user", "c")],
        [("user", "c"), answer_b, ("user", "/text")],
    ]
    stats = (
        "4 tokens; 100.0 tokens/s; the first after 12 ms; 2.50 tokens per forward pass; "
        "3 of 4 drafted tokens accepted (75%); by drafter: target 1, ngram 2, prediction 1"
    )
    notes = err.split("\n")
    assert notes[:2] == ["there is no complete answer yet", "nothing has been asked yet"]
    assert stats in notes
    assert "/nonsense is not a command; /help lists all" in notes


def test_a_failed_answer_prints_one_line_and_the_chat_continues() -> None:
    broken = streams(
        piece("half"), {"error": {"message": "the engine\nstopped", "code": None}}, DONE
    )
    special = {"a": fails(400, "messages: too long"), "b": broken, "c": fails(401, "who?")}
    with scripted_peer(server(**special)) as peer:
        status, out, err = chat("a\nb\nc\nd\n", peer.url)
        requests = said(peer)
    assert (status, out) == (1, "half\nyou said d\n")
    assert err.split("\n") == [
        "specserve: error: messages: too long",
        "specserve: error: the engine stopped",
        "specserve: error: who?; put the API key into the environment variable SPECSERVE_API_KEY",
        "",
    ]
    # What was shown counts as said; what failed before it does not.
    assert requests[-1] == [("user", "b"), ("assistant", "half"), ("user", "d")]


def test_a_failed_prompt_can_be_retried() -> None:
    fail = iter([fails(400), answers(b"", 500)])

    async def first_fails(request: web.Request) -> web.StreamResponse:
        script = next(fail, None)
        return await (script or server())(request)

    with scripted_peer(server(a=first_fails)) as peer:
        status, out, _ = chat("x\na\n/retry\n/retry\n", peer.url)
        before = [("user", "x"), ("assistant", "you said x")]
        assert said(peer)[1:] == [[*before, ("user", "a")]] * 3
    assert (status, out) == (1, "you said x\nyou said a\n")


def test_without_a_server() -> None:
    with scripted_peer(server()) as peer:
        url = peer.url
    status, out, err = chat("hello\n", url)
    assert (status, out) == (1, "")
    expected = (
        f"specserve: error: cannot connect to {url}: Connection refused; "
        "start a server with `specserve serve` or `make serve`\n"
    )
    assert err == expected


def test_the_key_comes_from_the_environment() -> None:
    with scripted_peer(server()) as peer:
        chat("a", peer.url, SPECSERVE_API_KEY="one")
        chat("a", peer.url, "--api-key-env", "OTHER", OTHER="two", SPECSERVE_API_KEY="one")
        keys = [headers.get("Authorization") for headers in peer.headers]
        assert keys == ["Bearer one"] * 2 + ["Bearer two"] * 2
        status, out, err = chat("a", peer.url, "--api-key-env", "NOT_THERE")
        assert (status, out) == (2, "")
        assert "NOT_THERE is not set" in err
        assert err.count("\n") == 1


def test_errors_of_settings_are_one_line() -> None:
    with scripted_peer(server()) as peer:
        for line in (["localhost:8000"], [peer.url, "--temperature", "nan"]):
            status, _, err = chat("a", *line)
            assert (status, err.count("\n")) == (2, 1)
            assert err.startswith("specserve: error: ")


# --- on a terminal


def test_ctrl_c_stops_the_answer_at_the_server_and_not_the_program() -> None:
    with scripted_peer(server(long=endless(piece("la ")))) as peer, terminal(peer.url) as user:
        user.wait_for(r"tiny at http")
        user.wait_for("> ")
        user.type("long\n")
        user.wait_for("la la la ")
        user.type("\x03")
        user.wait_for("stopped")
        assert peer.gone.wait(5)
        user.wait_for("> ")
        user.type("unfinished")
        user.wait_for("unfinished")
        user.interrupt("Ctrl-D or /exit leaves")  # at the prompt it drops the line
        user.type("next\n")
        user.wait_for("you said next")
        user.wait_for("> ")
        user.type("\x04")
        assert user.process.wait(10) == 0
        stopped, last = said(peer)
    assert stopped == [("user", "long")]
    assert last[1][0] == "assistant"
    assert last[1][1].startswith("la la la ")
    assert last[2] == ("user", "next")


def test_tokens_have_the_colour_of_their_drafter() -> None:
    def token(text: bytes) -> dict[str, Any]:
        return {"token": "?", "logprob": -1.0, "bytes": list(text), "top_logprobs": []}

    tokens = {"content": [token(b"plain "), token(b"gues"), token(b"sed\xc3"), token(b"\xa9 on")]}
    answer = (
        piece("plain guess", drafter_ids=[0, 1, 1, 255], logprobs=tokens),
        piece("edé on\x1b[2J"),
    )
    special = {"go": streams(*answer, DONE)}
    with scripted_peer(server(**special)) as peer:
        with terminal(peer.url, "--show-speculation") as user:
            user.wait_for("tokens by drafter: target.*ngram")
            user.type("go\n")
            shown = user.wait_for("2J")
            assert "plain \x1b[32mguess\x1b[0m\x1b[32medé\x1b[0m\x1b[92m on" in shown
            assert "\x1b[2J" not in shown  # nobody clears this screen but its user
            user.type("/exit\n")
            assert user.process.wait(10) == 0
        assert peer.bodies[-1]["logprobs"] is True


def test_errors_on_a_terminal_are_one_line_too() -> None:
    with scripted_peer(server(a=fails(503, "the engine is starting", Retry_After="4"))) as peer:
        with terminal(peer.url) as user:
            user.wait_for("> ")
            user.type("a\n")
            user.wait_for("error: the engine is starting; try again in 4 s")
            user.wait_for("> ")
            user.type("/quit\n")
            assert user.process.wait(10) == 0
        assert len(said(peer)) == 1


# --- which drafter id a character has


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=6), st.integers(0, 3)), max_size=8),
    st.lists(st.integers(1, 4), max_size=20),
    st.integers(0, 3),
)
def test_every_character_has_the_drafter_id_of_the_token_it_begins_in(
    parts: list[tuple[str, int]], sizes: list[int], lag: int
) -> None:
    text = "".join(part for part, _ in parts).encode(errors="replace").decode()
    raw = text.encode()
    owners = [drafter_id for part, drafter_id in parts for _ in part.encode(errors="replace")]
    # Tokens cut the bytes anywhere; each has the drafter id of its first byte.
    cuts = [0]
    for size in sizes:
        cuts.append(min(cuts[-1] + size, len(raw)))
    cuts = sorted({*cuts, len(raw)})
    tokens = [(raw[a:b], owners[a]) for a, b in pairwise(cuts)]
    runs = DrafterRuns()
    shown: list[tuple[str, int]] = []
    num_shown = 0
    for count, (token, drafter_id) in enumerate(tokens, start=1):
        ready = raw[: cuts[max(count - lag, 0)]].decode(errors="ignore")
        logprob = TokenLogprob("", 0.0, raw=token)
        delta = Delta(ready[num_shown:], drafter_ids=(drafter_id,), logprobs=(logprob,))
        shown += [(char, owner) for run, owner in runs.feed(delta) for char in run]
        num_shown = len(ready)
    shown += [(char, owner) for run, owner in runs.feed(Delta(text[num_shown:])) for char in run]
    token_of_byte = [drafter_id for token, drafter_id in tokens for _ in token]
    starts = [len(text[:index].encode()) for index in range(len(text))]
    assert shown == [(char, token_of_byte[at]) for char, at in zip(text, starts, strict=True)]
