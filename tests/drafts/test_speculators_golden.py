"""EAGLE-3 heads in every published layout against what the package `speculators` computes, and what
is exported against what it saves. golden/make_speculators.py made the files and says how."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eagle_chains import bound_drafter, chain_logits
from safetensors.torch import load_file
from torch import Tensor

from specserve.models.shape import ModelShape
from specserve_drafts.eagle.checkpoint import HeadCheckpoint, read_head
from specserve_drafts.tune.eagle_export import write_head
from specserve_drafts.tune.export import public_name

GOLDEN = Path(__file__).with_name("golden") / "speculators"
TARGET = GOLDEN / "target"
HEADS = ("authors", "eagle3", "eagle31", "norm_before", "qwen3", "specforge31")
STEPS = 3
EMBEDDING = "embed_tokens.weight"
# The class that loads it and the release are named differently, the dtype by the name that older
# releases know too, and the target's size even where it is the head's own.
OTHERWISE = {"architectures", "speculators_version", "torch_dtype", "target_hidden_size"}


def embed(ids: Tensor) -> Tensor:
    embedding = load_file(TARGET / "model.safetensors")["model.embed_tokens.weight"]
    return F.embedding(ids, embedding.float())


def read_golden(name: str) -> HeadCheckpoint:
    return read_head(GOLDEN / name, ModelShape.from_dir(TARGET))


def test_every_golden_head_is_compared() -> None:
    assert {path.parent.name for path in GOLDEN.glob("*/expected.safetensors")} == set(HEADS)


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_those_of_speculators(name: str) -> None:
    """Of every chain of three steps with given tokens, loaded as `--draft` loads it."""
    expected = load_file(GOLDEN / name / "expected.safetensors")
    drafter = bound_drafter(GOLDEN / name, TARGET, embed)
    logits = chain_logits(drafter, expected["input_ids"], expected["aux_hidden_states"], STEPS)
    for step in range(STEPS):
        torch.testing.assert_close(logits[step], expected[f"logits.{step}"], atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", HEADS)
def test_layers_and_tokens_are_those_of_speculators(name: str) -> None:
    file = read_golden(name)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    assert list(file.shape.aux_layers) == expected["layers"].tolist()
    weights = load_file(GOLDEN / name / "model.safetensors")
    if "t2d" in weights:
        assert file.token_ids is not None
        assert torch.equal(file.token_ids, weights["t2d"].nonzero()[:, 0])
    else:
        assert file.token_ids is None
        assert file.shape.draft_vocab_size == file.shape.vocab_size


@pytest.mark.parametrize("embedding", [True, False])
def test_an_export_is_what_speculators_saves(embedding: bool, tmp_path: Path) -> None:
    """Of the same head: every tensor, and every key that is written."""
    saved, file = load_file(GOLDEN / "eagle31" / "model.safetensors"), read_golden("eagle31")
    assert file.token_ids is not None
    apart = {EMBEDDING, "lm_head.weight", "d2t", "t2d"}
    write_head(
        tmp_path,
        file.shape,
        {name: tensor for name, tensor in saved.items() if name not in apart},
        saved["lm_head.weight"],
        file.token_ids,
        TARGET,
        STEPS,
        embedding=saved[EMBEDDING] if embedding else None,
    )
    written = load_file(tmp_path / "model.safetensors")
    assert set(saved) - set(written) == (set() if embedding else {EMBEDDING})
    assert not set(written) - set(saved)
    for name, tensor in written.items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name])
    ours, theirs = config(tmp_path), config(GOLDEN / "eagle31")
    assert set(ours) - set(theirs) == {"torch_dtype"}
    layer = ours.pop("transformer_layer_config")
    assert {name: theirs["transformer_layer_config"].get(name) for name in layer} == layer
    assert {name for name in ours if ours[name] != theirs.get(name)} == OTHERWISE


@pytest.mark.parametrize("own", [False, True])
def test_an_export_of_the_whole_vocabulary_has_no_map(own: bool, tmp_path: Path) -> None:
    """Speculators has no place for one; and the head is the target's, as the embedding is."""
    names, file = set(load_file(GOLDEN / "qwen3" / "model.safetensors")), read_golden("qwen3")
    assert not names & {"d2t", "t2d"}
    rows, ids = file.tensor("lm_head.weight"), torch.arange(file.shape.vocab_size)
    weights, embedding = {"norm.weight": file.tensor("norm.weight")}, rows.clone() if own else None
    write_head(tmp_path, file.shape, weights, rows, ids, TARGET, STEPS, embedding=embedding)
    more = {EMBEDDING, "lm_head.weight"} if own else set()
    assert set(load_file(tmp_path / "model.safetensors")) == {"norm.weight"} | more


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("/models/tiny", "tiny"),
        ("/cache/hub/models--org--tiny-1b/snapshots/0123abc", "org/tiny-1b"),
        ("snapshots/0123abc", "0123abc"),
    ],
)
def test_an_export_names_its_target_as_others_know_it(target: str, name: str) -> None:
    assert public_name(Path(target)) == name


def config(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / "config.json").read_text())
    return values
