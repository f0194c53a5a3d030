"""A trained head as a checkpoint in the layout of vllm-project/speculators, which `formats` reads.

The embedding is the target's, and so is a head over the whole vocabulary. Engines have them
already, and vLLM too takes them from the target if a file has none; speculators itself has them in
every file and needs them there, or loads them from the target (`load_verifier_weights`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from specserve.models.fields import read_json
from specserve_drafts.formats import TOKEN_ORDER
from specserve_drafts.head_shape import HeadShape
from specserve_drafts.tune.export import CONFIG, public_name, write_checkpoint

_LAYOUT: Final = "0.7.0"  # the first speculators with all of these fields
_ROPE: Final = ("rope_theta", "rope_scaling", "rope_parameters")  # as the target says it


def write_head(
    folder: Path,
    shape: HeadShape,
    weights: Mapping[str, Tensor],  # without the head's rows
    head: Tensor,  # [draft_vocab, hidden_size]
    token_ids: Tensor,  # [draft_vocab] int64, ascending
    target: Path,
    depth: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    embedding: Tensor | None = None,  # [vocab_size, hidden_size], the target's; None: left out,
    # as is a whole head
) -> None:
    """See `write_checkpoint`."""
    tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in weights.items()}
    if embedding is not None:
        tensors["embed_tokens.weight"] = embedding.to("cpu", dtype)
    is_part = len(ids := token_ids.cpu()) < shape.vocab_size
    if is_part or embedding is not None:
        tensors["lm_head.weight"] = head.to("cpu", dtype)
    if is_part:
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(shape.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    name = public_name(target)
    config = head_config(shape, read_json(target / CONFIG), name, depth, dtype)
    write_checkpoint(folder, tensors, config)


def write_token_order(folder: Path, counts: Tensor) -> None:
    """Beside a whole head: all tokens, the frequent ones first, for those who keep some of them.
    `counts`: [vocab_size]. Where none was seen BPE's rank decides: it merges what is frequent."""
    order = counts.argsort(descending=True, stable=True).to(torch.int32)
    part = folder / f"{TOKEN_ORDER}.part"
    save_file({"token_ids": order.contiguous()}, part)
    part.replace(folder / TOKEN_ORDER)


def head_config(
    shape: HeadShape, target: Mapping[str, Any], name: str, depth: int, dtype: torch.dtype
) -> dict[str, Any]:
    """`target` is its config.json."""
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
        "fc_norm": shape.tap_norm == "each",
        "norm_output": shape.norm_output,
        "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": list(shape.taps),
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": name, "architectures": target["architectures"]},
        },
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
