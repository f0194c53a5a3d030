"""No field of a request gets lost on its way: each is given a value of its own at every door, HTTP,
the client, the command line and `LLM`, and read back where the engine takes the request.

A field that is added to `SamplingParams` or `SpeculationParams` has to be added to the tables here,
and then arrives or fails the test.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from live import LiveServer, start_server
from recorded import recorded, recording
from tiny_chat import write_byte_chat

from specserve import LLM, Client
from specserve.client import SpeculationOptions
from specserve.engine.engine import Engine
from specserve.types import Request, SamplingParams, SpeculationParams

# Every value differs from the default. `n` is sent as 2, and two requests of one arrive.
SAMPLING: Final[dict[str, Any]] = {
    "temperature": 0.75,
    "top_k": 7,
    "top_p": 0.875,
    "min_p": 0.0625,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "repetition_penalty": 1.25,
    "logit_bias": {5: 1.5},
    "max_tokens": 9,
    "min_tokens": 2,
    "stop": ("x", "yz"),
    "stop_token_ids": (3, 4),
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "ignore_eos": True,
    "seed": 11,
    "logprobs": 2,
    "prompt_logprobs": 3,
    "n": 2,
}
PREDICTION: Final = "abc"
SPECULATION: Final[dict[str, Any]] = {
    "enabled": False,
    "max_nodes": 3,
    "drafters": ("ngram",),
    "prediction": tuple(PREDICTION.encode()),  # tokens of the model are bytes
}
OPTIONS: Final = {name: SPECULATION[name] for name in ("enabled", "max_nodes", "drafters")}
SETTINGS: Final = ("--dtype", "float32", "--device", "cpu", "--kv-memory", "4MiB", "--threads", "1")
DRAFTS: Final = ("--draft", "ngram", "--draft", "recycle")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_chat(tmp_path_factory.mktemp("fields") / "tiny-chat")


@pytest.fixture
def recorder(tmp_path: Path) -> dict[str, str]:
    return recording(tmp_path)


def check(requests: list[Request]) -> None:
    assert len(requests) == SAMPLING["n"]
    for index, request in enumerate(requests):
        arrived = msgspec.structs.asdict(request.sampling)
        expected = SAMPLING | {"n": 1}
        if index:  # a seed of its own, and what the first request computes
            assert arrived.pop("seed") != expected.pop("seed")
            expected["prompt_logprobs"] = None
        assert arrived == expected
        assert msgspec.structs.asdict(request.speculation) == SPECULATION


def test_the_tables_have_every_field_and_no_default() -> None:
    for table, struct in ((SAMPLING, SamplingParams), (SPECULATION, SpeculationParams)):
        assert set(table) == set(struct.__struct_fields__)
        defaults = msgspec.structs.asdict(struct())
        assert not [name for name, value in table.items() if value == defaults[name]]


@pytest.fixture
def server(model: Path, recorder: dict[str, str]) -> Iterator[LiveServer]:
    with start_server(model, *DRAFTS, **recorder) as server:
        yield server


def test_over_http(server: LiveServer, recorder: dict[str, str]) -> None:
    body = msgspec.to_builtins(SAMPLING, str_keys=True) | {
        "speculation": msgspec.to_builtins(OPTIONS),
        "prediction": {"type": "content", "content": PREDICTION},
    }
    reply = server.ask("/v1/completions", body | {"prompt": "a"})
    assert reply.status == 200, reply.body
    check(recorded(recorder, SAMPLING["n"]))

    top = body.pop("logprobs")
    chat = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": top}
    reply = server.ask("/v1/chat/completions", body | chat)
    assert reply.status == 200, reply.body
    check(recorded(recorder, SAMPLING["n"]))

    with Client(server.url) as client:
        for ask in (client.complete, client.chat):
            ask("b", **SAMPLING, speculation=SpeculationOptions(**OPTIONS), prediction=PREDICTION)
            check(recorded(recorder, SAMPLING["n"]))


def test_from_the_command_line(model: Path, recorder: dict[str, str]) -> None:
    line = [sys.executable, "-m", "specserve.cli", "generate", str(model), *SETTINGS, *DRAFTS]
    line += ["--raw", "--prompt", "a", "--json", "--prediction", PREDICTION]
    for name, value in SAMPLING.items():
        line += flags(name, value)
    for name, value in OPTIONS.items():
        line += flags(f"speculation_{name}", value)
    done = subprocess.run(line, env=os.environ | recorder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(recorded(recorder, SAMPLING["n"]))


def flags(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, dict):
        return [word for key, item in value.items() for word in (f"--{flag}", f"{key}={item}")]
    if isinstance(value, tuple):
        return [word for item in value for word in (f"--{flag}", str(item))]
    return [f"--{flag}", str(value)]


def test_from_python(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Request] = []
    submit = Engine.submit

    def record(self: Engine, request: Request) -> None:
        submit(self, request)
        requests.append(request)

    llm = LLM(str(model), draft=["ngram", "recycle"], dtype="float32", kv_memory="4MiB")
    monkeypatch.setattr(Engine, "submit", record)
    speculation = SpeculationParams(**OPTIONS)
    (done,) = llm.generate(
        "a", SamplingParams(**SAMPLING), speculation=speculation, predictions=PREDICTION
    )
    assert done.error is None
    check(requests)
