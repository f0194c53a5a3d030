"""Two keys: one asks for everything, the other is still served."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
from live import LiveServer, Reply, start_server
from load import SHORT, long_request, wait_until
from refusal import CHAT, COMPLETION, assert_refused
from tiny_chat import write_byte_chat
from wire import post, wire

HONEST: Final = {"Authorization": "Bearer honest-0123456789"}
GREEDY: Final = {"Authorization": "Bearer greedy-0123456789"}
ADMIN: Final = {"Authorization": "Bearer admin-0123456789"}
KEYS: Final = " ".join(
    f"{name}:{scope}:{name}-0123456789"
    for name, scope in (("honest", "inference"), ("greedy", "inference"), ("admin", "admin"))
)
HI: Final = {"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4, "ignore_eos": True}
CONTEXT: Final = 8192
ENDLESS: Final = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


class Shared(LiveServer):
    """A server with keys; reading its metrics needs one."""

    def metric(self, name: str, **labels: str) -> float:
        return self.figures.metric(name, **labels)

    @property
    def figures(self) -> LiveServer:
        return _WithKey(self.process, self.url, self.log)


class _WithKey(LiveServer):
    def ask(self, path: str, body: Any = None, **more: Any) -> Reply:
        return super().ask(path, body, **{"headers": ADMIN, **more})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    model = write_byte_chat(tmp_path_factory.mktemp("shared") / "tiny-chat", context=CONTEXT)
    flags = ("--kv-memory", "64MiB", "--template-timeout", "20")
    with start_server(model, *flags, SPECSERVE_API_KEYS=KEYS) as server:
        yield Shared(server.process, server.url, server.log)
        assert "Traceback" not in server.log.read_text()


@contextmanager
def greedy(server: LiveServer, path: str, bodies: list[dict[str, Any]]) -> Iterator[Any]:
    """The requests of the greedy key, sent concurrently."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        replies: list[Future[Reply]] = [
            pool.submit(server.ask, path, body, headers=GREEDY, timeout=120) for body in bodies
        ]
        yield replies


def num_done(replies: list["Future[Reply]"]) -> int:
    return sum(reply.done() for reply in replies)


def test_no_key_takes_all_sequences_and_the_whole_queue(shared: LiveServer) -> None:
    bodies = [long_request(2000, n=n, request_timeout=10) for n in (128, 128, 36)]
    with greedy(shared, COMPLETION, bodies) as replies:
        wait_until(lambda: shared.metric("vllm:num_requests_waiting") > 100)
        for _ in range(3):
            reply = shared.ask(CHAT, HI, headers=HONEST)
            assert reply.status == 200, reply
            assert reply.json()["usage"]["completion_tokens"] == 4
        refused = [reply.result() for reply in replies if reply.done()]
        assert [reply.status for reply in refused] == [429], "a key may fill the queue, or is alone"
        assert "this key" in assert_refused(refused[0], 429)["message"]


def test_a_priority_orders_requests_of_one_key_only(shared: LiveServer) -> None:
    expected = shared.ask(COMPLETION, SHORT, headers=HONEST).json()["choices"]
    bodies = [long_request(2000, priority=1000, request_timeout=10)] * 40
    with greedy(shared, COMPLETION, bodies) as replies:
        wait_until(lambda: shared.metric("vllm:num_requests_waiting") > 7)
        reply = shared.ask(COMPLETION, SHORT | {"priority": -5}, headers=HONEST)
        assert not num_done(replies), "it had to wait for the other key"
        assert reply.json()["choices"] == expected


def test_no_key_takes_all_tokenizer_processes(shared: LiveServer) -> None:
    text = {"prompt": "many words " * (1_000_000 // 11)}
    with greedy(shared, "/tokenize", [text] * 8) as replies:
        wait_until(lambda: shared.metric("specserve:tokenizer_jobs_waiting") > 5)
        for _ in range(3):
            assert shared.ask(CHAT, HI, headers=HONEST).status == 200
        assert shared.ask("/tokenize", {"prompt": "a" * 2000}, headers=HONEST).status == 200
        assert num_done(replies) < len(replies) - 2, "it had to wait for the other key"
        wait(replies)
    statuses = {reply.result().status for reply in replies}
    assert statuses <= {200, 400}, "so many tokens may be too many"


def test_no_key_waits_for_a_tokenizer_process_that_another_key_ended(tmp_path: Path) -> None:
    """While the process that replaces it is kept from starting, the other process is free."""
    model = write_byte_chat(tmp_path / "tiny-chat")
    file = model / "tokenizer_config.json"
    config = json.loads(file.read_text())
    endless = f"{{% if messages[0]['content'] == 'endless' %}}{ENDLESS}{{% endif %}}"
    file.write_text(json.dumps(config | {"chat_template": endless + config["chat_template"]}))
    body = HI | {"messages": [{"role": "user", "content": "endless"}]}
    with start_server(model, "--template-timeout", "1", SPECSERVE_API_KEYS=KEYS) as server:
        wait_until(lambda: len(tokenizer_pids(server)) == 2)
        first = tokenizer_pids(server)
        with greedy(server, CHAT, [body] * 3) as replies:
            wait_until(lambda: len(tokenizer_pids(server) - first) == 1)
            (replacement,) = tokenizer_pids(server) - first
            os.kill(replacement, signal.SIGSTOP)
            try:
                for _ in range(3):
                    assert server.ask(CHAT, HI, headers=HONEST).status == 200
                assert num_done(replies) == 1, "the other key got both processes"
            finally:
                os.kill(replacement, signal.SIGCONT)
        for reply in replies:
            assert_refused(reply.result(), 400, "messages")
        assert server.ask(CHAT, HI, headers=HONEST).status == 200


def tokenizer_pids(server: LiveServer) -> set[int]:
    return {pid for pid, command in server.children() if "tokenizer_worker" in command}


def test_no_key_holds_all_bodies(shared: LiveServer) -> None:
    """Bodies that have not arrived completely."""
    size = 8_000_000
    body = post(b" " * size, *(f"{name}: {value}" for name, value in GREEDY.items()))[:-1]
    with ExitStack() as stack:
        wires = [stack.enter_context(wire(shared)) for _ in range(5)]
        for one in wires[:4]:
            one.send(body)
        wait_until(lambda: shared.metric("specserve:body_bytes") >= 4 * (size - 1))
        with suppress(ConnectionError):  # it is refused before its end
            wires[4].send(body)
        error = assert_refused(wires[4].reply(), 429)
        assert "of this key" in error["message"]
        text = {"prompt": "a" * 8_000_000}
        assert_refused(shared.ask(COMPLETION, text, headers=HONEST), 400, "prompt")
        assert shared.ask(CHAT, HI, headers=HONEST).status == 200
    wait_until(lambda: shared.metric("specserve:body_bytes") == 0)


def test_the_deadline_includes_tokenizing(shared: LiveServer) -> None:
    text = {"prompt": "many words " * (1_500_000 // 11)}
    late = {"prompt": "a" * 70_000, "max_tokens": 1, "request_timeout": 0.3}
    with greedy(shared, "/tokenize", [text] * 3) as replies:
        wait_until(lambda: shared.metric("specserve:tokenizer_jobs_waiting") > 1)
        num_waiting = shared.metric("specserve:tokenizer_jobs_waiting")
        error = assert_refused(shared.ask(COMPLETION, late, headers=GREEDY), 408)
        assert error["code"] == "deadline_exceeded"
        assert num_done(replies) < len(replies), "it was not busy for long enough"
        assert shared.metric("specserve:tokenizer_jobs_waiting") <= num_waiting
    wait_until(lambda: shared.metric("specserve:body_bytes") == 0)
