"""Writes a trained EAGLE head in the layout of vllm-project/speculators (see `eagle.formats`).

The embedding is the target's, and so is an LM head over the whole vocabulary. Both are left out by
default: engines, vLLM included, take them from the target if a file lacks them. The speculators
package itself needs them in the file, or loads them from the target (`load_verifier_weights`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from specserve.models.fields import read_json
from specserve_drafts.atomic_write import atomic_write
from specserve_drafts.eagle.checkpoint import TOKEN_ORDER
from specserve_drafts.eagle.head_shape import HeadShape
from specserve_drafts.tune.export import CONFIG, public_name, write_checkpoint

_LAYOUT: Final = "0.7.0"  # the first speculators version with all fields written here
_ROPE: Final = ("rope_theta", "rope_scaling", "rope_parameters")  # copied from the target's config


def write_head(
    folder: Path,
    shape: HeadShape,
    weights: Mapping[str, Tensor],  # by internal name, without the LM head
    head: Tensor,  # [draft_vocab, hidden_size], the LM head rows
    token_ids: Tensor,  # [draft_vocab] int64, ascending
    target: Path,
    depth: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    embedding: Tensor | None = None,  # [vocab_size, hidden_size], the target's
) -> None:
    """Write the checkpoint to `folder`, atomically per file.

    Without `embedding` the file has no embedding, and no LM head if that covers the whole
    vocabulary. `depth` is the number of tokens to draft that the config recommends.
    """
    tensors = dict(weights)
    if embedding is not None:
        tensors["embed_tokens.weight"] = embedding
    is_part = len(ids := token_ids.cpu()) < shape.vocab_size
    if is_part or embedding is not None:
        tensors["lm_head.weight"] = head
    if is_part:
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(shape.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    config = head_config(shape, read_json(target / CONFIG), public_name(target), depth)
    write_checkpoint(folder, tensors, config, dtype)


def write_token_order(folder: Path, counts: Tensor) -> None:
    """Write TOKEN_ORDER: all tokens by frequency, for `HeadCheckpoint.with_draft_vocab`.

    counts: [vocab_size]. Equal counts are ordered by id, as BPE merges frequent tokens first.
    """
    order = counts.argsort(descending=True, stable=True).to(torch.int32)
    with atomic_write(folder / TOKEN_ORDER) as part:
        save_file({"token_ids": order.contiguous()}, part)


def head_config(
    shape: HeadShape, target: Mapping[str, Any], name: str, depth: int
) -> dict[str, Any]:
    """config.json of the checkpoint. target: the target's config.json; name: its public name."""
    layer = {
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_position_embeddings,
        "vocab_size": shape.vocab_size,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    } | {key: target[key] for key in _ROPE if target.get(key) is not None}
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": depth,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _LAYOUT,
        "transformer_layer_config": layer,
        "draft_vocab_size": shape.draft_vocab_size,
        "target_hidden_size": shape.target_hidden_size,
        "norm_before_residual": shape.norm_before_residual,
        "norm_before_fc": False,
        "fc_norm": shape.aux_norm == "each",
        "norm_output": shape.norm_output,
        "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": list(shape.aux_layers),
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": name, "architectures": target["architectures"]},
        },
    }
