"""Values that no model has: refused by field within moments, before anything is allocated."""

import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import write_tiny_llama

from specserve.models.fields import ModelError
from specserve.models.llama import LlamaModel

Load = Callable[..., LlamaModel]
FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "model_type",
    "architectures",
    "quantization_config",
    "something_else",
]
ROPE_FIELDS = [
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "rope_type",
]
ABSURD: list[Any] = [
    *(0, 1, -1, 2, 3, 2**20, 2**31 - 1, 2**31, 2**62, -(2**62), 2**64, 10**30, True, False, None),
    *(0.0, 0.5, 1e-300, -1.0, 1e12, 1e308, math.nan, math.inf, -math.inf, 5e-324),
    *("", "1", "x" * 10**6, [], [1], ["x" * 1000] * 1000, {}, {"a": {"b": [1] * 1000}}, [[[]]]),
]
ROPE: dict[str, Any] = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
absurd = st.sampled_from(ABSURD)
SETTINGS = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path, seed=1)


def _set_config(model: Path, changes: dict[str, Any]) -> None:
    written = model / "written.json"
    if not written.is_file():
        (model / "config.json").rename(written)
    config = {**json.loads(written.read_text()), **changes}
    (model / "config.json").write_text(json.dumps(config))


def _assert_refused_at_once_or_served(model: Path, load: Load, changes: dict[str, Any]) -> None:
    _set_config(model, changes)
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        served = load(model, exact=False)
        angles = served.rotary.angles(torch.arange(served.shape.max_position_embeddings)[-2:])
        assert all(part.isfinite().all() for part in angles)
    except ModelError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 700 + 4 * len(str(model))
    assert time.process_time() - started < 1.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


@SETTINGS
@given(changes=st.dictionaries(st.sampled_from(FIELDS), absurd, min_size=1, max_size=3))
@example(changes={"hidden_size": 2**31 - 1, "num_attention_heads": 2**31 - 1})
@example(changes={"num_hidden_layers": 2**31 - 1})
@example(changes={"num_hidden_layers": 10_000})
@example(changes={"head_dim": 2**30})
@example(changes={"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 2})
def test_absurd_fields(model: Path, load: Load, changes: dict[str, Any]) -> None:
    _assert_refused_at_once_or_served(model, load, changes)


@SETTINGS
@given(
    kind=st.sampled_from(["default", "linear", "llama3", "yarn"]),
    changes=st.dictionaries(st.sampled_from(ROPE_FIELDS), absurd, min_size=1, max_size=3),
)
@example(kind="yarn", changes={"factor": 1e9})
@example(kind="yarn", changes={"factor": 1e6})
@example(kind="yarn", changes={"original_max_position_embeddings": 1, "factor": None})
@example(kind="llama3", changes={"low_freq_factor": 3.9999999999999996})
def test_absurd_rope(model: Path, load: Load, kind: str, changes: dict[str, Any]) -> None:
    scaling = {"rope_type": kind, **ROPE, **changes}
    _assert_refused_at_once_or_served(model, load, {"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 2**31}, "vocab_size = 2147483648: expected an integer from 1 to"),
        ({"hidden_size": 2**20}, r"\(vocab_size, hidden_size\)|hidden_size"),
        ({"intermediate_size": 2**30}, r"mlp.* says \[1073741824, 32\] \(intermediate_size"),
        ({"num_attention_heads": 2**30}, r"q_proj.*\(num_attention_heads x head_dim"),
        ({"head_dim": 2**30}, "q_proj.*x head_dim"),
        ({"num_hidden_layers": 9000}, "num_hidden_layers = 9000: the weights have 2 layers"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers = 1073741824: expected .* to 10000"),
        ({"max_position_embeddings": 1}, "max_position_embeddings = 1: expected .* from 2"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings = 2147483648: expected"),
        ({"rope_theta": math.nan}, "rope_theta = nan: expected a number"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps = inf: expected a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e5}}, "factor = 100000.0: 512 positions"),
        ({"hidden_act": "x" * 10**6}, "hidden_act = 'xxx.*xxx': only silu"),
    ],
)
def test_the_field_is_named(model: Path, load: Load, changes: dict[str, Any], message: str) -> None:
    _set_config(model, changes)
    with pytest.raises(ModelError, match=message):
        load(model)


def test_a_number_that_only_training_used_may_be_none(model: Path, load: Load) -> None:
    _set_config(model, {"attention_dropout": math.nan, "initializer_range": math.inf})
    load(model)


def test_weights_that_do_not_fit_in_memory_are_not_tried(tmp_path: Path, load: Load) -> None:
    """A file of 8 TiB, nearly all of it a hole, and the config that goes with it."""
    rows, hidden = 2**31 - 1, 1024
    shapes = {
        "model.embed_tokens.weight": (rows, hidden),
        "model.norm.weight": (hidden,),
        **{
            f"model.layers.0.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                **{f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"},
                **{f"mlp.{part}_proj": (hidden, hidden) for part in ("gate", "up", "down")},
            }.items()
        },
    }
    entries, end = {}, 0
    for name, shape in shapes.items():
        first, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": (first, end)}
    header = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"takes 8192\.0 GiB and .* GiB are free on cpu; set dtype"
    ):
        load(tmp_path)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_weight_that_is_no_number_names_its_tensor(
    model: Path, load: Load, name: str, dtype: torch.dtype, value: float, exact: bool
) -> None:
    tensors = {
        key: tensor.to(dtype) for key, tensor in load_file(model / "model.safetensors").items()
    }
    tensors[name].view(-1)[-3] = value
    save_file(tensors, model / "model.safetensors")
    at = r"\[\d+(, \d+)?\]"
    with pytest.raises(
        ModelError, match=rf"safetensors: {name} has 1 values .* first at {at}; fetch"
    ):
        load(model, exact=exact)


def test_weights_whose_sum_overflows_are_numbers(model: Path, load: Load) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(3e38)
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.full((64, 32), 6e4).half()
    save_file(tensors, model / "model.safetensors")
    load(model, exact=False)
