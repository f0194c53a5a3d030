"""Logits against transformers, in one pass and through the cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from specserve.batch import ModelOutput
from specserve.cache.storage import KVStorage
from specserve.models.llama import LlamaModel

TABLE = [5, 2, 9, 0, 7, 3, 1, 8]  # blocks are not in order
NUM_TOKENS = 100
VOCAB = 97


def _config(kind: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return kind(**{**sizes, **changes})


def _scaled(kind: str, factor: float, **more: float) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 500.0, "factor": factor, **more}


CONFIGS = {
    "mha": _config(LlamaConfig, num_key_value_heads=4),
    "biases": _config(LlamaConfig, attention_bias=True, mlp_bias=True),
    "smollm": _config(
        LlamaConfig,
        hidden_size=72,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    ),
    "llama3_rope": _config(
        LlamaConfig,
        rope_parameters=_scaled(
            "llama3",
            4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "linear_rope": _config(LlamaConfig, rope_parameters=_scaled("linear", 3.0)),
    "yarn_rope": _config(
        LlamaConfig,
        head_dim=32,
        rope_parameters=_scaled("yarn", 4.0, original_max_position_embeddings=64),
    ),
    "mistral_window": _config(MistralConfig, sliding_window=24),
    "mistral_layers": _config(
        MinistralConfig,
        sliding_window=24,
        head_dim=12,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "qwen2": _config(Qwen2Config, tie_word_embeddings=True),
    "qwen2_windows": _config(
        Qwen2Config, use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    "qwen3": _config(Qwen3Config, head_dim=20),
}


@pytest.fixture(params=CONFIGS)
def pair(
    request: pytest.FixtureRequest,
    save_reference: Callable[..., PreTrainedModel],
    load: Callable[..., LlamaModel],
    tmp_path: Path,
) -> tuple[PreTrainedModel, LlamaModel]:
    """The reference and ours, of the same random weights."""
    reference = save_reference(CONFIGS[request.param])
    if request.param == "mistral_layers":  # a Mistral that says so is run as a Ministral
        text = (tmp_path / "config.json").read_text()
        text = text.replace("MinistralForCausalLM", "MistralForCausalLM")
        (tmp_path / "config.json").write_text(text.replace('"ministral"', '"mistral"'))
    return reference, load(tmp_path)


def _tokens(count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, VOCAB, (count,), generator=generator).tolist()
    return ids


def _reference(model: PreTrainedModel, tokens: list[int], **options: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False, **options)


def _assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.1  # logits that say something
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_logits_of_one_prefill(
    pair: tuple[PreTrainedModel, LlamaModel],
    run_rows: Callable[..., ModelOutput],
    prefill_rows: Callable[..., list[Any]],
) -> None:
    theirs, ours = pair
    kv = KVStorage(ours.kv_spec, 160, torch.device("cpu"))
    tokens = _tokens(NUM_TOKENS)
    out = run_rows(ours, kv, prefill_rows(TABLE, 0, tokens))
    _assert_close(out.logits, _reference(theirs, tokens).logits[0])


def test_logits_through_the_cache(
    pair: tuple[PreTrainedModel, LlamaModel],
    run_rows: Callable[..., ModelOutput],
    prefill_rows: Callable[..., list[Any]],
) -> None:
    """Two prompt chunks, a plain decode step, then a tree; every root path is a text of its own."""
    theirs, ours = pair
    kv = KVStorage(ours.kv_spec, 160, torch.device("cpu"))
    tokens = _tokens(NUM_TOKENS)
    run_rows(ours, kv, prefill_rows(TABLE, 0, tokens[:37]))
    run_rows(ours, kv, prefill_rows(TABLE, 37, tokens[37:]))
    step = run_rows(ours, kv, [(TABLE, NUM_TOKENS, [11], [-1])])
    _assert_close(step.logits, _reference(theirs, [*tokens, 11]).logits[0, -1:])

    nodes, parents = [11, 12, 13, 14, 15, 16], [-1, 0, 1, 0, 3, 0]
    tree = run_rows(ours, kv, [(TABLE, NUM_TOKENS, nodes, parents)])
    for path in ([0, 1, 2], [0, 3, 4], [0, 5]):
        text = tokens + [nodes[node] for node in path]
        _assert_close(tree.logits[path], _reference(theirs, text).logits[0, NUM_TOKENS:])


def test_aux_hidden_states_are_the_residual_stream(
    save_reference: Callable[..., PreTrainedModel],
    load: Callable[..., LlamaModel],
    run_rows: Callable[..., ModelOutput],
    prefill_rows: Callable[..., list[Any]],
    tmp_path: Path,
) -> None:
    theirs = save_reference(CONFIGS["smollm"])
    ours = load(tmp_path)
    tokens = _tokens(13)
    states = _reference(theirs, tokens, output_hidden_states=True).hidden_states
    kv = KVStorage(ours.kv_spec, 160, torch.device("cpu"))
    out = run_rows(ours, kv, prefill_rows(TABLE, 0, tokens), aux_layers=(3, 0, 2))
    assert out.aux_hidden_states is not None
    last, first, third = torch.split(out.aux_hidden_states[:13], ours.shape.hidden_size, dim=1)
    torch.testing.assert_close(first, states[0][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(third, states[2][0], atol=1e-4, rtol=0)
    # transformers gives the last state after the final norm
    torch.testing.assert_close(ours.norm(last), states[3][0], atol=1e-4, rtol=0)
    _assert_close(ours.logits(last), _reference(theirs, tokens).logits[0])
