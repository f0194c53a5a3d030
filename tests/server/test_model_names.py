"""The name of a model: derived from what is served, and usable in requests."""

import os
from pathlib import Path
from urllib.parse import quote

import pytest
from live import start_server

from specserve.config import ConfigError, ServerConfig, load_config
from specserve.hub.resolve import base_name
from specserve.speculation.registry import public_names

LONGEST = 256


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (".", "here"),
        ("./", "here"),
        ("..", "above"),
        ("../here", "here"),
        ("sub/..", "here"),
        ("sub/", "sub"),
        ("/models/a/", "a"),
        ("org/model", "model"),
        ("smollm2-135m", "smollm2-135m"),
        ("folder/model.Q4_0.gguf", "model.Q4_0.gguf"),
    ],
)
def test_a_model_is_named_after_its_directory(
    spec: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert base_name(spec) == name
    assert public_names([spec]) == [name]


def test_a_link_keeps_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "version-7").mkdir()
    (tmp_path / "current").symlink_to("version-7")
    assert base_name(str(tmp_path / "current")) == "current"


@pytest.mark.parametrize(
    "name", ["", "x" * (LONGEST + 1), "new\nline", "nul\0", "\x1b[2J", "\ud800"]
)
def test_invalid_model_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^served_model_name: "):
        load_config({"served_model_name": name}, sections=("server",))


@pytest.mark.parametrize(
    "name", ["x" * LONGEST, "org/model-ü", "模型 一号", "🙂", 'quo"te', "%2e%2e"]
)
def test_valid_model_names_are_accepted(name: str) -> None:
    assert ServerConfig(served_model_name=name).served_model_name == name


def test_the_working_directory_is_served_under_its_name(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(chat_model)
    with start_server(Path(".")) as server:
        (model,) = server.ask("/v1/models").json()["data"]
        assert model["id"] == os.path.basename(chat_model)
        assert server.ask(f"/v1/models/{quote(model['id'])}").status == 200
        body = {"model": model["id"], "prompt": "a", "max_tokens": 1}
        assert server.ask("/v1/completions", body).json()["model"] == model["id"]
