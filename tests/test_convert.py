"""`specserve convert`: old checkpoints become drafts, and no pickle gets to run anything."""

import json
import os
import pickle
import runpy
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle_heads import write_eagle
from medusa_heads import NUM_HEADS, write_medusa
from safetensors.torch import load_file
from torch import Tensor

from specserve.cli import convert as convert_command
from specserve.cli import main
from specserve.cli.convert import ConvertError, convert
from specserve.speculation.drafter import DraftError
from specserve.speculation.registry import create_drafter

CHILD = Path(convert_command.__file__).with_name("convert_child.py")


class Intruder:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self._marker),))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with a config and no weights yet."""
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"medusa_num_heads": NUM_HEADS}))
    return directory


def refuse(source: Path, out: Path, message: str, **more: float) -> None:
    """It must say so, and leave nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(ConvertError, match=message):
        convert(source, out, **more)
    assert sorted(out.parent.iterdir()) == before


def test_an_eagle_checkpoint_becomes_a_draft(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, out = write_eagle(tmp_path / "old", "official").path, tmp_path / "new" / "draft"
    tensors = load_file(old / "model.safetensors")
    (old / "model.safetensors").unlink()
    torch.save(tensors, old / "pytorch_model.bin")
    torch.save({"learning_rate": 0.1}, old / "training_args.bin")
    with pytest.raises(DraftError, match=rf"specserve convert {old} OUT"):
        create_drafter(str(old), {}, tiny_model, Path)
    assert main(["convert", str(old), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    assert (out / "config.json").read_bytes() == (old / "config.json").read_bytes()
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1
    converted = load_file(out / "model.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in tensors.items())
    create_drafter(str(out), {}, tiny_model, Path)


def test_shared_tensors_and_views_become_separate(tiny_model: Path, tmp_path: Path) -> None:
    """The authors' code makes the layers of a Medusa head one and the same."""
    medusa = write_medusa(tmp_path / "old")
    (medusa.path / "model.safetensors").unlink()
    tensors: OrderedDict[str, Any] = OrderedDict(medusa.tensors)
    tensors["0.1.linear.weight"] = torch.nn.Parameter(tensors["0.0.linear.weight"])
    tensors["1.0.linear.weight"] = torch.randn(64, 64)[::2, 1::2]
    tensors["1.0.linear.bias"] = torch.ones(1).expand(32)
    torch.save(tensors, medusa.path / "medusa_lm_head.pt")
    convert(medusa.path / "medusa_lm_head.pt", tmp_path / "new")
    converted = load_file(tmp_path / "new" / "model.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in tensors.items())
    create_drafter(str(tmp_path / "new"), {}, tiny_model, Path)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("torch.save", r"it asks for \S+\.mkdir, which is no tensor and could run code"),
        ("old torch.save", r"it asks for \S+\.mkdir, which is no tensor and could run code"),
        ("pickle 2", r"it asks for \S+\.mkdir, which is no tensor and could run code"),
        ("pickle 5", r"it is damaged, or no state dict of torch\.save \(Unsupported operand 149\)"),
    ],
)
def test_code_in_a_file_never_runs(
    form: str, message: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where torch is told to run it."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, tried = tmp_path / "marker", tmp_path / "tried"
    pickle.loads(pickle.dumps(Intruder(tried)))
    assert tried.exists()  # it does work
    weights = source / "pytorch_model.bin"
    if form.startswith("pickle"):
        weights.write_bytes(pickle.dumps({"x": Intruder(marker)}, protocol=int(form[-1])))
    else:
        content = {"w": torch.zeros(2), "x": Intruder(marker)}
        new = form == "torch.save"
        torch.save(content, weights, _use_new_zipfile_serialization=new)
    refuse(source, tmp_path / "out", message)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"epoch": 3, "w": torch.zeros(1), "model": {"v": torch.zeros(1)}},
            r"epoch \(int\), model \(dict\); save the state dict alone",
        ),
        ({f"n{i}": i for i in range(9)}, r"n4 \(int\) and 4 more; save"),
        ({1: torch.zeros(2)}, r"more than tensors by name: 1 \(cpu strided float32\)"),
        ({"q": torch.zeros(2, dtype=torch.uint8)}, r"q \(cpu strided uint8\)"),
        ({"s": torch.eye(2).to_sparse()}, r"s \(cpu sparse_coo float32\)"),
        ({"m": torch.zeros(2, device="meta")}, r"m \(meta strided float32\)"),
        ({"\x1b[2Jx": 1}, r"\?\[2Jx \(int\)"),
        ([torch.zeros(2)], r"it holds a list; expected tensors by name"),
        (torch.zeros(2), r"it holds a Tensor; expected"),
        ({}, r"it holds no tensors"),
    ],
)
def test_what_is_no_state_dict_is_refused(content: object, message: str) -> None:
    child = runpy.run_path(str(CHILD))
    with pytest.raises(child["Refused"], match=message):
        child["_tensors"](content)


def test_a_refusal_reaches_the_user(source: Path, tmp_path: Path) -> None:
    torch.save({"epoch": 3, "w": torch.zeros(1)}, source / "model.pth")
    refuse(source, tmp_path / "out", r"model\.pth: it holds more than tensors by name: epoch \(int")


def test_a_small_file_may_not_ask_for_much_memory(source: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(2**31)}, source / "model.pth")
    refuse(source, tmp_path / "out", r"it needs more than the 1\.0 GiB that a file of its size may")


@pytest.mark.parametrize("cut", [0, 600])
def test_a_damaged_file_is_refused(cut: int, source: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(400)}, source / "w.pt")
    (source / "w.pt").write_bytes((source / "w.pt").read_bytes()[:cut])
    refuse(source, tmp_path / "out", r"w\.pt: it is damaged, or no state dict of torch\.save")


def test_what_takes_too_long_is_ended(source: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, source / "w.pt")
    refuse(source, tmp_path / "out", r"it took longer than 0\.01 s", time_limit=0.01)


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ([], ".", r"has no \.bin, \.pt, \.pth file to convert"),
        (["a.bin", "b.pt"], ".", r"has a\.bin, b\.pt; give the one file"),
        (
            ["medusa_lm_head.pt", "pytorch_model.bin"],
            ".",
            r"has medusa_lm_head\.pt, pytorch_model\.bin; give",
        ),
        ([], "nowhere", r"nowhere does not exist; give a directory or a weights file"),
        (["model.safetensors"], "model.safetensors", r"nothing to convert"),
    ],
)
def test_the_file_must_be_clear(
    files: list[str], given: str, message: str, source: Path, tmp_path: Path
) -> None:
    for name in files:
        (source / name).touch()
    refuse(source / given, tmp_path / "out", message)


def test_only_a_checkpoint_with_a_config_and_a_new_place_will_do(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors: dict[str, Tensor] = {"w": torch.zeros(4)}
    torch.save(tensors, source / "w.pt")
    out = tmp_path / "out"
    out.mkdir()
    refuse(source, out, r"out exists; give a new directory")
    assert main(["convert", str(source), str(out)]) == 2
    assert capsys.readouterr().err.startswith("specserve: error: convert: ")
    out.rmdir()
    out.symlink_to(tmp_path / "nowhere")
    refuse(source, out, r"out exists; give a new directory")
    (source / "config.json").unlink()
    refuse(source, tmp_path / "other", r"source has no config\.json")
    (source / "config.json").touch()
    with pytest.raises(ConvertError, match=r"cannot be written \(Not a directory\)"):
        convert(source, source / "w.pt" / "out")


def test_the_command_itself_opens_nothing() -> None:
    code = "import sys, specserve.cli.convert as c; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
