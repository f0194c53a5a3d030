"""Impossible values in the config.json of a head are refused by name, or have no effect."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eagle_heads import save, write_eagle
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from medusa_heads import write_medusa

from specserve.models.shape import ModelShape
from specserve.speculation.drafter import DraftError
from specserve.speculation.registry import checkpoint_method
from specserve_drafts.eagle.checkpoint import read_head
from specserve_drafts.medusa.checkpoint import read_medusa

EAGLE_FIELDS = [
    "hidden_size",
    "target_hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "vocab_size",
    "draft_vocab_size",
    "logit_scale",
    "eagle_aux_hidden_state_layer_ids",
    "eagle_config",
]
MEDUSA_FIELDS = [
    "medusa_num_heads",
    "medusa_num_layers",
    "hidden_size",
    "vocab_size",
    "logit_scale",
    "original_lm_head",
]
ABSURD: list[Any] = [
    *(0, 1, -1, 3, 2**31 - 1, 2**31, 2**62, 10**30, True, None, 0.5, 1e308, math.nan, math.inf),
    *("x" * 10**6, [], [1] * 10**5, {}, {"a": [1] * 1000}),
    *({"rope_type": "yarn", "factor": factor} for factor in (1e9, 0.0, math.nan, "x")),
]
SETTINGS = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def shape(tiny_model: Path) -> ModelShape:
    return ModelShape.from_dir(tiny_model)


def _assert_quick_and_short(read: Callable[[], object], path: Path) -> None:
    started = time.process_time()
    try:
        checkpoint_method(path)
        read()
    except DraftError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 1200
    assert time.process_time() - started < 1.5


def _changes(fields: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(fields), st.sampled_from(ABSURD), min_size=1, max_size=2)


@SETTINGS
@given(layout=st.sampled_from(["eagle1", "official", "eagle31"]), changes=_changes(EAGLE_FIELDS))
@example(layout="official", changes={"eagle_aux_hidden_state_layer_ids": [1] * 10**5})
@example(layout="official", changes={"num_hidden_layers": 10_000})
@example(layout="eagle1", changes={"num_hidden_layers": 2**31 - 1})
def test_eagle(shape: ModelShape, tmp_path: Path, layout: str, changes: dict[str, Any]) -> None:
    written = write_eagle(tmp_path, layout)
    written.config |= changes
    save(written)
    _assert_quick_and_short(lambda: read_head(tmp_path, shape), tmp_path)


@SETTINGS
@given(changes=_changes(MEDUSA_FIELDS))
@example(changes={"medusa_num_layers": 10_000})
@example(changes={"medusa_num_layers": 2**31 - 1, "medusa_num_heads": 2**31 - 1})
def test_medusa(shape: ModelShape, tmp_path: Path, changes: dict[str, Any]) -> None:
    written = write_medusa(tmp_path)
    written.config |= changes
    written.save()
    _assert_quick_and_short(lambda: read_medusa(tmp_path, shape), tmp_path)
