"""Medusa heads in all published formats are read; heads for another target are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from medusa_heads import LAYOUTS, NUM_HEADS, write_medusa
from torch import Tensor

from specserve.speculation.drafter import DraftError
from specserve.speculation.registry import checkpoint_method, create_drafter
from specserve_drafts.medusa.drafter import MedusaDrafter


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised(layout: str, tmp_path: Path) -> None:
    assert checkpoint_method(write_medusa(tmp_path, layout).path) == "medusa"


def test_the_number_of_heads_is_read_from_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    """The config.json of the authors says 2, with 5 heads; tensor names have several prefixes."""
    heads = write_medusa(tmp_path)
    heads.config["medusa_num_heads"] = 2
    heads.tensors = {f"medusa_heads.{name}": tensor for name, tensor in heads.tensors.items()}
    heads.save()
    drafter = create_drafter(str(tmp_path), {}, tiny_model, Path)
    assert isinstance(drafter, MedusaDrafter)
    assert drafter._num_heads == NUM_HEADS


@pytest.mark.parametrize(
    ("layout", "config", "tensors", "message"),
    [
        ("vllm", {"hidden_size": 64}, {}, r"hidden_size = 64: the target has 32; use the draft"),
        ("vllm", {"vocab_size": 98}, {}, r"vocab_size = 98: the target has 97; use the draft"),
        ("vllm", {"num_heads": 4}, {}, r"num_heads = 4: the weights beside it have 3 heads"),
        ("authors", {"medusa_num_heads": 0}, {}, r"medusa_num_heads = 0: expected an integer"),
        ("authors", {"medusa_num_layers": 1}, {}, r"missing: 0\.1\.weight.*medusa_num_layers"),
        ("authors", {"logit_scale": "x"}, {}, r"logit_scale = 'x': expected a number"),
        ("authors", {}, {"1.0.linear.weight": None}, r"missing: 1\.0\.linear\.weight"),
        ("vllm_mapped_shared", {}, {"lm_heads.0.weight": None}, r"missing: 0\.2\.weight"),
        ("vllm_mapped_shared", {"original_lm_head": False}, {}, r"missing: 1\.2\.weight"),
        ("vllm", {"original_lm_head": 2}, {}, r"original_lm_head = 2: expected true or false"),
        ("authors", {}, {"lm_head.weight": torch.zeros(2)}, r"unexpected: lm_head\.weight"),
        (
            "authors",
            {},
            {"0.2.weight": torch.zeros(98, 32)},
            r"0\.2\.weight has shape \[98, 32\].*\[97, 32\]; use the draft",
        ),
        (
            "vllm",
            {},
            {"blocks.1.layers.0.weight": torch.zeros(64, 64)},
            r"blocks\.1\.layers\.0\.weight has shape \[64, 64\].*is \[32, 32\]",
        ),
        (
            "vllm_mapped",
            {},
            {"token_map": torch.arange(60, 100)},
            r"token_map names token 97, outside the target's vocabulary of 97",
        ),
        ("vllm_mapped", {}, {"token_map": torch.zeros(40).long()}, r"names a token twice"),
        ("vllm_mapped", {}, {"token_map": torch.zeros(40)}, r"token_map.*expected a list"),
        ("vllm_mapped", {}, {"token_map": None}, r"lm_heads\.0\.weight has shape \[40, 32\]"),
    ],
)
def test_heads_for_another_target_are_refused(
    layout: str,
    config: dict[str, Any],
    tensors: dict[str, Tensor | None],
    message: str,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    heads = write_medusa(tmp_path, layout)
    heads.config |= config
    changed = heads.tensors | tensors
    heads.tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    heads.save()
    with pytest.raises(DraftError, match=message):
        create_drafter(str(tmp_path), {}, tiny_model, Path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branching": 0}, r"options\.medusa\.branching: 0 is out of range"),
        ({"num_heads": 4}, r"options\.medusa\.num_heads: 4 is out of range.*3 heads"),
        ({"heads": 1}, r"draft\.options\.medusa.*num_heads"),
    ],
)
def test_options_out_of_range_are_refused(
    options: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    write_medusa(tmp_path)
    with pytest.raises(DraftError, match=message):
        create_drafter(str(tmp_path), {"medusa": options}, tiny_model, Path)


def test_pickled_heads_are_never_opened(tiny_model: Path, tmp_path: Path) -> None:
    write_medusa(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "medusa_lm_head.pt")
    with pytest.raises(DraftError, match=r"medusa_lm_head\.pt.*`specserve convert"):
        create_drafter(str(tmp_path), {}, tiny_model, Path)


def test_without_a_checkpoint_there_are_no_heads(tiny_model: Path) -> None:
    with pytest.raises(DraftError, match="'medusa' needs a checkpoint"):
        create_drafter("medusa", {}, tiny_model, Path)
