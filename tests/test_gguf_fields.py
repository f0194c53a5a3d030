"""GGUF metadata: every key is understood, known to be harmless or refused; absurd values too."""

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gguf_models import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specserve.hub import HubError
from specserve.hub.convert import convert_gguf
from specserve.models.checkpoint import read_checkpoint
from specserve.models.fields import ModelError
from specserve.models.shape import ModelShape
from specserve.models.weight_check import check_weights

Convert = Callable[[dict[str, Any]], dict[str, Any]]
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """convert(metadata): what config.json becomes of a tiny Llama with them."""
    return partial(_convert, tmp_path)


def _convert(directory: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    path = write_gguf(directory / "tiny.gguf", metadata)
    convert_gguf(path, directory, lambda stage, fraction: None)
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"rope.scaling.factor": 4.0}, LINEAR),
        ({"rope.scale_linear": 4.0}, LINEAR),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, LINEAR),
        ({"rope.scaling.factor": 0.0, "rope.scale_linear": 4.0}, LINEAR),
        ({"rope.scaling.type": "linear", "rope.scale_linear": 4.0}, LINEAR),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scale_linear": 1.0}, None),
        ({"rope.scaling.type": "linear"}, None),
    ],
)
def test_rope_scaling_without_a_type_is_linear(
    convert: Convert, metadata: dict[str, Any], scaling: dict[str, Any] | None
) -> None:
    config = convert({f"llama.{key}": value for key, value in metadata.items()})
    assert config.get("rope_scaling") == scaling


@pytest.mark.parametrize(
    "metadata",
    [
        {"vocab_size": 260, "rope.scaling.finetuned": True, "attention.causal": True},
        {"attention.value_length": 16, "attention.key_length": 16, "attention.scale": 0.25},
        {"attention.head_count_kv": [2, 2], "feed_forward_length": [96, 96]},
        {"attention.head_count": [4, 4], "logit_scale": 1.0, "attention.sliding_window": 0},
        {"expert_count": 0, "expert_used_count": 0, "final_logit_softcapping": 0.0},
    ],
)
def test_metadata_that_makes_no_difference(convert: Convert, metadata: dict[str, Any]) -> None:
    plain = convert({})
    assert convert({f"llama.{key}": value for key, value in metadata.items()}) == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window", 32),
        ("attention.scale", 0.5),
        ("attention.value_length", 8),
        ("attention.causal", False),
        ("attention.clamp_kqv", 8.0),
        ("attention.head_count_kv", [2, 4]),
        ("logit_scale", 16.0),
        ("embedding_scale", 12.0),
        ("residual_scale", 0.2),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("rope.scaling.alpha", 2.0),
        ("rope.dimension_sections", [2, 3, 3, 0]),
        ("leading_dense_block_count", 1),
    ],
)
def test_what_is_not_computed_is_refused_by_its_key(convert: Convert, key: str, value: Any) -> None:
    with pytest.raises(HubError, match=rf"tiny\.gguf: llama\.{key} = "):
        convert({f"llama.{key}": value})


KEYS = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.original_context_length",
    "expert_count",
]
ABSURD = [
    *(0, 1, -1, 3, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, -(2**62), True, False),
    *(0.0, 1e-30, -1.0, 1e30, math.nan, math.inf, -math.inf, "", "x" * 10**6, [1], [2**31 - 1, 7]),
]
Found = partial(st.dictionaries, st.sampled_from(KEYS), st.sampled_from(ABSURD), min_size=1)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(metadata=Found(max_size=3))
def test_absurd_metadata_is_refused_at_once_or_served(
    tmp_path: Path, metadata: dict[str, Any]
) -> None:
    started = time.process_time()
    try:
        _convert(tmp_path, {f"llama.{key}": value for key, value in metadata.items()})
        (tmp_path / "model.gguf").unlink(missing_ok=True)
        (tmp_path / "model.gguf").symlink_to(tmp_path / "tiny.gguf")
        check_weights(tmp_path, ModelShape.from_dir(tmp_path), read_checkpoint(tmp_path))
    except (HubError, ModelError) as error:
        message = str(error)
        assert "\n" not in message
        assert len(message.replace(str(tmp_path), "")) < 700
    assert time.process_time() - started < 1.0


def test_metadata_of_many_items(convert: Convert) -> None:
    with pytest.raises(HubError, match=r"llama\.block_count = \[7, 8, .*\.\.\.\]") as error:
        convert({"llama.block_count": [7, 8] * 10_000})
    assert len(str(error.value)) < 300
