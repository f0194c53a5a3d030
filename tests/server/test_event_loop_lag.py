"""No request blocks the event loop, however large or unusual its body."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from live import LiveServer, start_server
from refusal import CHAT, COMPLETION
from tiny_chat import write_byte_chat

MAX_BODY: Final = 8 * 2**20
# CPU seconds of the event loop's thread per request. No callback can block the loop for longer,
# except while the thread waits for a processor. Receiving 8 MiB takes 10 to 40 ms; decoding such
# bodies in the event loop took up to 1 s.
MAX_CPU: Final = 0.1
TRIES: Final = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_chat(tmp_path_factory.mktemp("lag") / "tiny-chat", context=8192)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LiveServer]:
    with start_server(model, "--template-timeout", "60") as live:
        yield live


def filled(before: bytes, item: bytes, after: bytes) -> bytes:
    """A body of the largest allowed size: `item` repeated between `before` and `after`."""
    count = (MAX_BODY - len(before) - len(after)) // len(item)
    return before + (item * count)[: -1 if item.endswith(b",") else None] + after


HI: Final = b'"messages":[{"role":"user","content":"Hi."}]'
BODIES: Final[dict[str, tuple[str, bytes]]] = {
    "an unknown field": (CHAT, filled(b'{"x":[', b"[],", b"]}")),
    "a known field": (CHAT, filled(b"{" + HI + b',"metadata":[', b"[],", b"]}")),
    "many fields": (
        CHAT,
        b"{" + b",".join(b'"%07d":1' % number for number in range(MAX_BODY // 12)) + b"}",
    ),
    "a field of a message": (
        CHAT,
        filled(b'{"messages":[{"role":"user","content":"a","x":[', b"[],", b"]}]}"),
    ),
    "parts of a message": (
        CHAT,
        filled(b'{"messages":[{"role":"user","content":[', b'{"type":"text","text":""},', b"]}]}"),
    ),
    "messages": (CHAT, filled(b'{"messages":[', b"{},", b"]}")),
    "a text": (COMPLETION, filled(b'{"prompt":"', b"a ", b'"}')),
    "escapes": (COMPLETION, filled(b'{"prompt":"', b"\\u00e9", b'"}')),
    "empty prompts": (COMPLETION, filled(b'{"prompt":[', b'"",', b"]}")),
    "ids": (COMPLETION, filled(b'{"prompt":[', b"1,", b"]}")),
    "lists of ids": (COMPLETION, filled(b'{"prompt":[', b"[1],", b"]}")),
    "stop tokens": (COMPLETION, filled(b'{"prompt":"a","stop_token_ids":[', b"1,", b"]}")),
    "a prediction": (
        COMPLETION,
        filled(b'{"prompt":"a","prediction":{"type":"content","content":"', b"a ", b'"}}'),
    ),
    "a text to tokenise": ("/tokenize", filled(b'{"prompt":"', b"a", b'"}')),
    "a text to spell out": (
        "/tokenize",
        b'{"return_token_strs":true,"prompt":"' + b"a" * 2**20 + b'"}',
    ),
    "ids to decode": ("/detokenize", b'{"tokens":[' + b"97," * (2**20 - 1) + b"97]}"),
    "too many ids to decode": ("/detokenize", filled(b'{"tokens":[', b"1,", b"]}")),
    "no JSON": (CHAT, b"[" * MAX_BODY),
}


def cpu_seconds(server: LiveServer, happens: Callable[[], object]) -> float:
    """The least CPU time that the event loop's thread took for `happens`, of several tries."""

    def now() -> float:  # the main thread runs the event loop
        pid = server.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) * 1e-9

    tries = []
    for _ in range(TRIES):
        before = now()
        happens()
        tries.append(now() - before)
    return min(tries)


@pytest.mark.parametrize("name", BODIES)
def test_large_bodies_do_not_block_the_event_loop(server: LiveServer, name: str) -> None:
    path, body = BODIES[name]
    assert len(body) <= MAX_BODY
    statuses = []
    spent = cpu_seconds(server, lambda: statuses.append(server.ask(path, body).status))
    assert spent <= MAX_CPU
    assert set(statuses) <= {200, 400, 413}


def test_many_choices_with_many_stop_strings_do_not_block_the_event_loop(
    server: LiveServer,
) -> None:
    """Stop strings are prepared once, not for every choice."""
    stops = [f"{index:03}" + "ab" * 500 for index in range(16)]
    body = {"prompt": "a", "n": 128, "max_tokens": 1, "stop": stops}
    assert cpu_seconds(server, lambda: server.ask(COMPLETION, body)) <= MAX_CPU
