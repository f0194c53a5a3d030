"""Files of a model directory that are no files: nothing waits for them, each is named."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from gguf_models import write_gguf
from tiny import write_tiny_llama

from specserve.files import FileError, quoted, read_file
from specserve.hub import HubError, resolve
from specserve.models.fields import ModelError
from specserve.models.loader import load_model
from specserve.speculation.drafter import DraftError
from specserve.speculation.registry import checkpoint_method
from specserve.text import Tokenizer, TokenizerError
from specserve_kernels.dispatch import select_kernels

CPU = torch.device("cpu")
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model.gguf",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]


def _load(model: Path) -> None:
    load_model(model, kernels=select_kernels(CPU), dtype=torch.float32, device=CPU, exact=False)


def _start(model: Path) -> None:
    Tokenizer(model)
    _load(model)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _directory(path: Path) -> None:
    path.mkdir()


def _nothing(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket may not be long
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


KINDS: dict[Callable[[Path], None], str] = {
    _fifo: "a FIFO",
    _device: "a device",
    _directory: "a directory",
    _socket: "a socket",
    _nothing: "a link to a file that is not there",
    _loop: "cannot be read",
}


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    yield write_tiny_llama(tmp_path / "model", seed=1)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_named_at_once(
    model: Path, name: str, make: Callable[[Path], None]
) -> None:
    if name.endswith((".index.json", ".gguf")):  # only looked at without what comes before
        (model / "model.safetensors").unlink()
    (model / name).unlink(missing_ok=True)
    make(model / name)
    with pytest.raises((ModelError, TokenizerError)) as error:
        _start(model)
    assert name in str(error.value) or name == "model.gguf"
    assert KINDS[make] in str(error.value) or name == "model.gguf"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_draft_whose_config_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "config.json")
    with pytest.raises(DraftError, match=rf"config\.json: .*{KINDS[make]}"):
        checkpoint_method(tmp_path)


@pytest.mark.parametrize("make", [_fifo, _device, _socket, _nothing, _loop])
def test_a_target_that_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "model.gguf")
    with pytest.raises(HubError, match=r"target: .*model\.gguf' is no directory or \.gguf file"):
        resolve(str(tmp_path / "model.gguf"))


def test_a_gguf_file_behind_a_link_that_became_a_fifo(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    directory = resolve(str(path), cache_dir=tmp_path / "cache")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ModelError, match=r"tiny\.gguf: it is a FIFO"):
        load_model(
            directory, kernels=select_kernels(CPU), dtype=torch.float32, device=CPU, exact=False
        )


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FileError, match=r"config\.json: 1099511627776 bytes are too many"):
        read_file(path, 2**20)


def test_values_are_quoted_on_one_short_line() -> None:
    nested: list[object] = []
    for _ in range(10_000):
        nested = [nested]
    many: object = {"a": [{}] * 10**6}
    values: list[object] = ["x" * 10**6, "a\nb" * 10**5, [7] * 10**6, many, 10**5000, nested]
    for value in values:
        assert len(quoted(value)) < 400
        assert "\n" not in quoted(value)
    assert quoted("gelu") == "'gelu'"
