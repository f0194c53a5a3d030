"""EAGLE heads in all published formats are read; heads for another target are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle_heads import AUX_LAYERS, LAYOUTS, save, write_eagle
from safetensors.torch import save_file
from tiny import TINY_VOCAB, write_tiny_llama

from specserve.models.shape import ModelShape
from specserve.speculation.drafter import DraftError
from specserve.speculation.registry import checkpoint_method, create_drafter, expanded
from specserve_drafts import compatibility
from specserve_drafts.eagle.checkpoint import read_head
from specserve_drafts.eagle.drafter import EagleDrafter


@pytest.fixture(scope="module")
def shape(tiny_model: Path) -> ModelShape:
    return ModelShape.from_dir(tiny_model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_recognised(layout: str, shape: ModelShape, tmp_path: Path) -> None:
    written = write_eagle(tmp_path, layout)
    assert checkpoint_method(tmp_path) == "eagle"
    head = read_head(tmp_path, shape)
    assert head.shape.aux_layers == AUX_LAYERS[layout]
    assert head.shape.kind == ("eagle1" if layout == "eagle1" else "eagle3")
    assert head.shape.norm_before_residual == written.flags["norm_before_residual"]
    assert head.shape.norm_output == written.flags["norm_output"]
    ids = torch.arange(TINY_VOCAB) if head.token_ids is None else head.token_ids
    assert torch.equal(ids, written.token_ids)
    for name, tensor in written.tensors.items():
        if name not in ("d2t", "t2d"):
            assert torch.equal(head.tensor(name), tensor)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_head_is_recognised_by_its_tensors_whatever_its_config_names(
    name: str, prefix: str, shape: ModelShape, tiny_model: Path, tmp_path: Path
) -> None:
    """Other files beside it do not matter, and a language model with one more layer is no head."""
    written = write_eagle(tmp_path / "head", "eagle1")
    written.config |= {"architectures": [name], "model_type": name.split("For")[0].lower()}
    written.tensors = {prefix + n: t for n, t in written.tensors.items()}
    save(written)
    (written.path / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    assert checkpoint_method(written.path) == "eagle"
    head = read_head(written.path, shape).shape
    assert (head.kind, head.qk_norm) == ("eagle1", False)
    model = write_tiny_llama(tmp_path / "model", seed=0, num_layers=1)
    (model / "tokenizer.json").unlink()
    assert checkpoint_method(model) == "draft_lm"


def test_a_config_with_its_layers_nested_reads_as_if_flat(
    shape: ModelShape, tmp_path: Path
) -> None:
    written = write_eagle(tmp_path, "eagle1")
    flat = read_head(tmp_path, shape).shape
    nested = {"architectures": ["EAGLEModel"], "model_type": "eagle", "model": written.config}
    written.config = nested | {"truncated_vocab_size": TINY_VOCAB}
    save(written)
    assert checkpoint_method(tmp_path) == "eagle"
    assert read_head(tmp_path, shape).shape == flat
    written.config["truncated_vocab_size"] = 50
    save(written)
    with pytest.raises(DraftError, match=r"draft_vocab_size = 50: the weights have no lm_head"):
        read_head(tmp_path, shape)


def test_default_aux_layers_are_the_authors(tmp_path: Path) -> None:
    deep = ModelShape.from_dir(write_tiny_llama(tmp_path / "target", seed=0, num_layers=30))
    written = write_eagle(tmp_path / "head", "official")
    del written.config["eagle_aux_hidden_state_layer_ids"]
    save(written)
    assert read_head(written.path, deep).shape.aux_layers == (2, 15, 27)
    assert read_head(written.path, deep, aux_layers=(1, 2, 30)).shape.aux_layers == (1, 2, 30)


def test_nested_flags_are_read(shape: ModelShape, tmp_path: Path) -> None:
    written = write_eagle(tmp_path, "eagle31")
    del written.config["norm_output"]
    written.config["eagle_config"]["norm_output"] = True
    save(written)
    assert read_head(tmp_path, shape).shape.norm_output


@pytest.mark.parametrize("config", [[], {"architectures": 5}, {"architectures": {"0": "x"}}])
def test_a_config_that_describes_no_draft_is_an_error(tmp_path: Path, config: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DraftError, match=r"config\.json:? (h|not)"):
        checkpoint_method(tmp_path)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("official", {"hidden_size": 64}, r"hidden_size = 64: the target has 32; use the draft"),
        ("official", {"target_hidden_size": 16}, r"target_hidden_size = 16: the target has 32"),
        ("official", {"vocab_size": 98}, r"vocab_size = 98: the target has 97; use the draft"),
        ("official", {"draft_vocab_size": 98}, r"draft_vocab_size = 98: expected 1 to 97"),
        ("official", {"draft_vocab_size": 39}, r"lm_head\.weight has shape \[40, 32\].*\[39, 32\]"),
        ("official", {"num_hidden_layers": 2}, r"missing: layers\.1\.input_layernorm\.weight"),
        ("official", {"num_key_value_heads": 3}, r"num_key_value_heads = 3: must divide"),
        ("official", {"hidden_act": "gelu"}, r"hidden_act = 'gelu': only silu"),
        ("official", {"intermediate_size": "x"}, r"intermediate_size = 'x': expected an integer"),
        (
            "official",
            {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]},
            r"aux_layers = \[0, 1, 3\]: the target has layers 0 to 2.*options\.eagle",
        ),
        (
            "official",
            {"eagle_aux_hidden_state_layer_ids": [0, 1]},
            r"aux_layers.* = \[0, 1\]: fc\.weight takes 3; set draft\.options\.eagle\.aux_layers",
        ),
        (
            "official",
            {"eagle_aux_hidden_state_layer_ids": "all"},
            r"eagle_aux_hidden_state_layer_ids = 'all': expected a list of layers",
        ),
        ("eagle31", {"norm_before_fc": True}, r"fc_norm = True: and norm_before_fc exclude"),
        ("official", {"fc_norm": True}, r"missing: fc_norm\.0\.weight"),
        (
            "specforge",
            {"eagle_config": {"use_aux_hidden_state": False}},
            r"use_aux_hidden_state = False: only heads over several layers",
        ),
        ("speculators", {"speculators_model_type": "peagle"}, r"speculators_model_type = 'peagle'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    layout: str, change: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    written = write_eagle(tmp_path, layout)
    written.config |= change
    save(written)
    with pytest.raises(DraftError, match=message):
        create_drafter(str(tmp_path), {}, tiny_model, Path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d2t": torch.full((40,), 90)}, r"d2t points to token 97, outside.*vocabulary of 97"),
        ({"d2t": -torch.arange(40)}, r"d2t names a token twice"),
        ({"d2t": torch.zeros(3, dtype=torch.int64)}, r"d2t has shape \[3\].*draft_vocab_size 40"),
        ({"d2t": torch.arange(40) * 2.5}, r"d2t holds numbers that are not whole"),
        ({"d2t": torch.arange(40)}, r"d2t names 40 tokens and t2d marks 40, not all the same"),
        ({"t2d": torch.ones(97)}, r"d2t names 40 tokens and t2d marks 97, not all the same"),
        ({"t2d": torch.ones(96)}, r"t2d has shape \[96\].*each of the target's 97 tokens"),
        ({"d2t": None}, r"draft_vocab_size = 40: the weights have no d2t"),
        ({"lm_head.weight": None}, r"draft_vocab_size = 40: the weights have no lm_head\.weight"),
        ({"fc.weight": None}, r"have no fc\.weight; this is no EAGLE head"),
        ({"norm.weight": None}, r"missing: norm\.weight"),
        ({"mask_hidden": torch.zeros(1, 1, 96)}, r"unexpected: mask_hidden"),
        ({"norm.weight": torch.zeros(31)}, r"norm\.weight has shape \[31\].*\[32\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    written = write_eagle(tmp_path, "official")
    written.tensors = {n: t for n, t in (written.tensors | change).items() if t is not None}
    save(written)
    with pytest.raises(DraftError, match=message):
        create_drafter(str(tmp_path), {}, tiny_model, Path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_token_ids_in_place_of_offsets_are_detected(
    dtype: torch.dtype, shape: ModelShape, tmp_path: Path
) -> None:
    """With and without `t2d`, in any order; offsets are still accepted."""
    written = write_eagle(tmp_path, "official")
    ids, t2d = written.token_ids, written.tensors["t2d"]
    written.tensors["d2t"] = written.tensors["d2t"].to(dtype)
    for marks in (t2d, t2d.to(torch.uint8), t2d.float(), None):
        written.tensors |= {"t2d": marks} if marks is not None else {}
        if marks is None:
            del written.tensors["t2d"]
        save(written)
        read = read_head(tmp_path, shape).token_ids
        assert read is not None
        assert torch.equal(read, ids)
    shuffled = ids[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    for tokens in (ids, shuffled, torch.arange(0, 80, 2)):
        written.tensors["d2t"] = tokens.to(dtype)
        for marks in (torch.zeros(TINY_VOCAB).index_fill(0, tokens, 1.0), None):
            written.tensors.pop("t2d", None)
            written.tensors |= {"t2d": marks} if marks is not None else {}
            save(written)
            with pytest.raises(DraftError, match=r"d2t looks like token ids.*torch\.arange"):
                read_head(tmp_path, shape)


def test_a_head_of_another_width_needs_an_embedding(shape: ModelShape, tmp_path: Path) -> None:
    written = write_eagle(tmp_path, "official")
    written.config |= {"hidden_size": 48, "target_hidden_size": 32}
    save(written)
    with pytest.raises(DraftError, match=r"hidden_size = 48: .* lack embed_tokens\.weight"):
        read_head(tmp_path, shape)


def test_pickled_weights_are_never_opened(tiny_model: Path, tmp_path: Path) -> None:
    for layout in ("eagle1", "official"):
        path = write_eagle(tmp_path / layout, layout).path
        (path / "model.safetensors").unlink()
        (path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(DraftError, match=r"pytorch_model\.bin.*convert them to safetensors"):
            create_drafter(str(path), {}, tiny_model, Path)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("official", {"beam": 0}, r"options\.eagle\.beam: 0 is out of range"),
        ("official", {"min_probability": 1.5}, r"eagle\.min_probability: 1\.5 is .* 0 to 1$"),
        ("official", {"draft_vocab": 41}, r"draft_vocab: 41; expected 1 to 40"),
        ("eagle1", {"draft_vocab": 98}, r"draft_vocab: 98; expected 1 to 97"),
        ("official", {"aux_layers": [0, 1]}, r"\[0, 1\]: fc\.weight takes 3"),
        ("official", {"aux_layer": [0]}, r"aux_layer: unknown option; did you mean 'aux_layers'"),
    ],
)
def test_options_out_of_range_are_refused(
    layout: str, options: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    write_eagle(tmp_path, layout)
    with pytest.raises(DraftError, match=message):
        create_drafter(str(tmp_path), {"eagle": options}, tiny_model, Path)


@pytest.mark.parametrize("order", [range(1, 98), [0] * 97, range(96)])
def test_an_invalid_token_order_is_refused(
    order: list[int], tiny_model: Path, tmp_path: Path
) -> None:
    write_eagle(tmp_path, "eagle1")
    save_file({"token_ids": torch.tensor(list(order))}, tmp_path / "token_order.safetensors")
    with pytest.raises(DraftError, match="token_ids must hold each of 97 tokens once"):
        create_drafter(str(tmp_path), {"eagle": {"draft_vocab": 20}}, tiny_model, Path)


def test_without_a_checkpoint_the_pretrained_head_is_used(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DraftError, match="there is no pretrained 'eagle' head for this target"):
        create_drafter("eagle", {}, tiny_model, Path)
    assert expanded(["auto"], tiny_model) == ["recycle"]
    written = write_eagle(tmp_path / "a-head", "speculators")
    written.config["speculators_config"] = {"verifier": {"name_or_path": tiny_model.name}}
    save(written)
    monkeypatch.setattr(compatibility, "PRETRAINED", tmp_path)
    assert isinstance(create_drafter("eagle", {}, tiny_model, Path), EagleDrafter)
    assert expanded(["auto", "none", "recycle"], tiny_model) == ["recycle", "eagle", "none"]
    written.config["transformer_layer_config"]["vocab_size"] += 1  # another model of that name
    save(written)
    assert expanded(["auto"], tiny_model) == ["recycle"]


def test_the_drafter_requests_the_layers_that_its_head_reads(
    tiny_model: Path, tmp_path: Path
) -> None:
    write_eagle(tmp_path, "speculators_qwen3")
    drafter = create_drafter(str(tmp_path), {}, tiny_model, Path)
    assert isinstance(drafter, EagleDrafter)
    assert drafter.aux_layers == (0, 2)
