"""The sampling parameters that a model recommends: read from its files, and the defaults at every
door; what a request gives itself counts more."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from gguf_models import write_gguf
from live import LiveServer, start_server
from recorded import recorded, recording
from tiny_chat import write_byte_chat

from specserve import LLM, AsyncLLM, Client, SamplingParams
from specserve.cli.main import main
from specserve.config import ConfigError, EngineConfig
from specserve.hub.convert import convert_gguf
from specserve.models.fields import ModelError
from specserve.models.generation_config import RECOMMENDED, read_default_sampling

VOCAB: Final = 64
# Every value differs from the one of SamplingParams().
VALUES: Final[dict[str, Any]] = {
    "temperature": 0.75,
    "top_k": 7,
    "top_p": 0.875,
    "min_p": 0.0625,
    "repetition_penalty": 1.25,
}
OTHERS: Final = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
HELLO: Final = [{"role": "user", "content": "Name a colour"}]


def write(directory: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "generation_config.json").write_text(text)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_byte_chat(tmp_path_factory.mktemp("recommends") / "tiny-chat")
    return write(directory, {"do_sample": True, "transformers_version": "4.51.0", **VALUES})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (VALUES, VALUES),
        ({}, {}),
        (dict.fromkeys(RECOMMENDED), {}),
        ({"do_sample": None, "temperature": None, "top_p": 0.5}, {"top_p": 0.5}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": False, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.6}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 1e-6}, {"temperature": 0.0}),
        ({"top_k": 0}, {}),
        ({"top_k": -1}, {}),
        ({"top_k": VOCAB}, {"top_k": VOCAB}),
        ({"top_k": VOCAB + 1}, {}),
        ({"max_new_tokens": 3, "num_beams": 4, "typical_p": "x", "eos_token_id": 2}, {}),
    ],
)
def test_what_a_file_means(tmp_path: Path, content: Any, expected: dict[str, Any]) -> None:
    defaults = read_default_sampling(write(tmp_path, content), "auto", VOCAB)
    assert defaults == SamplingParams(**expected)
    assert read_default_sampling(tmp_path, "none", VOCAB) == SamplingParams()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"temperature": -0.5}, "temperature = -0.5: -0.5 is out of range"),
        ({"temperature": "hot"}, "temperature = 'hot': 'hot' is not a number"),
        ({"temperature": True}, "temperature = True"),
        ({"temperature": 10**400}, "temperature = 1000"),
        ('{"temperature": NaN}', "temperature = nan"),
        ('{"top_p": Infinity}', "top_p = inf"),
        ({"top_p": 0}, "top_p = 0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"top_k": -2}, "top_k = -2"),
        ({"top_k": 2.5}, "top_k = 2.5"),
        ({"min_p": 2}, "min_p = 2"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"repetition_penalty": 1, "top_k": [5]}, r"top_k = \[5\]"),
        ({"do_sample": "no"}, "do_sample = 'no'"),
        ("[]", "not a JSON object"),
        ("{", "not a JSON object"),
    ],
)
def test_a_value_that_no_request_could_have(tmp_path: Path, content: Any, words: str) -> None:
    write(tmp_path, content)
    with pytest.raises(ModelError, match=rf"generation_config\.json: {words}") as error:
        read_default_sampling(tmp_path, "auto", VOCAB)
    if words.startswith(RECOMMENDED):
        assert "--generation-config none" in str(error.value)
    assert read_default_sampling(tmp_path, "none", VOCAB) == SamplingParams()


def test_without_the_file_and_with_another(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    assert read_default_sampling(own, "auto") == SamplingParams()
    with pytest.raises(ConfigError, match=r"generation_config: there is no .*other.*give auto"):
        read_default_sampling(own, str(other))
    write(own, {"top_k": 3})
    assert read_default_sampling(own, str(write(other, VALUES))) == SamplingParams(**VALUES)


@pytest.fixture
def recorder(tmp_path: Path) -> dict[str, str]:
    return recording(tmp_path)


@pytest.fixture
def server(model: Path, recorder: dict[str, str]) -> Iterator[LiveServer]:
    with start_server(model, **recorder) as server:
        yield server


def arrived(recorder: dict[str, str]) -> dict[str, Any]:
    """The recommended parameters of the last request, where the engine takes it."""
    sampling = recorded(recorder, 1)[0].sampling
    return {name: getattr(sampling, name) for name in RECOMMENDED}


def test_over_http(server: LiveServer, recorder: dict[str, str]) -> None:
    (shown,) = server.ask("/v1/models").json()["data"]
    assert shown["default_sampling_params"] == VALUES
    assert "sampling defaults: temperature 0.75, top_k 7" in server.log.read_text()
    with Client(server.url) as client:
        assert client.models()[0].default_sampling_params == VALUES
        for path, prompt in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": HELLO}),
        ):
            body: dict[str, Any] = {"max_tokens": 9, "seed": 5, "return_token_ids": True, **prompt}
            plain = server.ask(path, body | {"speculation": {"enabled": False}}).json()
            assert arrived(recorder) == VALUES
            drafted = server.ask(path, body | dict.fromkeys(VALUES)).json()
            assert arrived(recorder) == VALUES
            ids = [answer["choices"][0]["token_ids"] for answer in (plain, drafted)]
            assert ids[0] == ids[1]
            server.ask(path, body | OTHERS)
            assert arrived(recorder) == VALUES | OTHERS
            server.ask(path, body | {"top_k": -1, "repetition_penalty": 1})
            assert arrived(recorder) == VALUES | {"top_k": 0, "repetition_penalty": 1.0}
        client.complete("a", max_tokens=2)
        assert arrived(recorder) == VALUES


def test_from_the_command_line(model: Path, recorder: dict[str, str]) -> None:
    line = [sys.executable, "-m", "specserve.cli", "generate", str(model), "--device", "cpu"]
    line += ["--prompt", "a", "--max-tokens", "2", "--temperature", "1"]
    done = subprocess.run(line, env=os.environ | recorder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert arrived(recorder) == VALUES | {"temperature": 1.0}


def test_from_python(model: Path) -> None:
    settings: dict[str, Any] = {"draft": "none", "dtype": "float32", "kv_memory": "4MiB"}
    llm = LLM(str(model), **settings)
    assert llm.default_sampling_params == SamplingParams(**VALUES)
    (default,) = llm.generate([1, 2, 3])
    assert default.error is None
    # A SamplingParams that is given is complete: what it leaves out is not the model's.
    given = SamplingParams(seed=3, max_tokens=20)
    recommended = msgspec.structs.replace(llm.default_sampling_params, seed=3, max_tokens=20)
    ids = [llm.generate([1, 2, 3], each)[0].token_ids for each in (given, recommended)]
    without = LLM(str(model), generation_config="none", **settings)
    assert without.default_sampling_params == SamplingParams()
    assert without.generate([1, 2, 3], given)[0].token_ids == ids[0]
    assert ids[0] != ids[1]


def test_a_model_that_does_not_sample(tmp_path: Path) -> None:
    model = write(write_byte_chat(tmp_path / "greedy"), {"do_sample": False, "temperature": 0.9})
    llm = LLM(str(model), draft="ngram", dtype="float32", kv_memory="4MiB")
    (default,) = llm.generate([1, 2, 3])
    (greedy,) = llm.generate([1, 2, 3], SamplingParams(temperature=0.0))
    assert default.token_ids == greedy.token_ids

    assert [i for delta in llm.stream([1, 2, 3]) for i in delta.token_ids] == list(greedy.token_ids)

    async def ask() -> tuple[list[int], tuple[int, ...]]:
        async with AsyncLLM(str(model), dtype="float32", kv_memory="4MiB") as other:
            (whole,) = await other.generate([1, 2, 3])
            streamed = [i async for each in other.stream([1, 2, 3]) for i in each.token_ids]
            return streamed, whole.token_ids

    assert asyncio.run(ask()) == (list(greedy.token_ids), greedy.token_ids)


def test_a_bad_file_ends_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write(write_byte_chat(tmp_path / "bad"), {"top_p": 7}))
    line = ["generate", model, "--prompt", "a", "--max-tokens", "1", "--device", "cpu"]
    assert main(line) == 2
    assert "generation_config.json: top_p = 7" in capsys.readouterr().err
    assert main([*line, "--generation-config", "none"]) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "temperature 0.75, top_k 7, top_p 0.875, min_p 0.0625, repetition_penalty 1.25"),
        (("--generation-config", "none"), "temperature 1"),
    ],
)
def test_settings_in_force(
    model: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    assert main(["serve", str(model), *flags, "--print-config"]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"sampling defaults: {words}\n"
    config = msgspec.toml.decode(shown.out, type=EngineConfig)
    assert config.target.generation_config == (flags[1] if flags else "auto")
    assert main(["doctor", str(model), *flags, "--device", "cpu"]) == 0
    assert f"sampling defaults  {words}" in capsys.readouterr().out


def test_gguf_metadata(tmp_path: Path) -> None:
    keys = {
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.8,
        "general.sampling.min_p": 0.05,
        "general.sampling.penalty_repeat": 1.1,
        "general.sampling.mirostat": 0,
    }
    expected: dict[str, Any] = dict(zip(RECOMMENDED, (0.7, 20, 0.8, 0.05, 1.1), strict=True))
    cases: list[tuple[dict[str, Any], dict[str, float] | None, dict[str, Any]]] = [
        (keys, None, expected),
        (keys, {"min_p": 0.5}, expected),
        ({}, {"temperature": 0.2}, {"temperature": 0.2}),
        ({}, None, {}),
    ]
    for metadata, sampling, found in cases:
        file = write_gguf(tmp_path / "tiny.gguf", metadata)
        convert_gguf(file, tmp_path, lambda stage, fraction: None, sampling)
        assert read_default_sampling(tmp_path, "auto") == SamplingParams(**found)
