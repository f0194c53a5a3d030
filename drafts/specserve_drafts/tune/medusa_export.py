"""Writes trained Medusa heads in vLLM's layout (see `medusa.checkpoint`); the authors' layout does
not support a reduced vocabulary."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from specserve_drafts.tune.export import public_name, write_checkpoint


def write_heads(
    folder: Path,
    weights: Mapping[str, Tensor],  # blocks.{head}.layers.0.{weight,bias}, lm_heads.{head}.weight
    token_ids: Tensor,  # [draft_vocab] int64, ascending
    vocab_size: int,
    target: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the checkpoint to `folder`, atomically per file. target: the target's directory."""
    tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in weights.items()}
    if len(token_ids) < vocab_size:
        tensors["token_map"] = token_ids.cpu()
    unembeddings = [tensor for name, tensor in tensors.items() if name.startswith("lm_heads.")]
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": unembeddings[0].shape[1],
        "vocab_size": vocab_size,
        "truncated_vocab_size": len(token_ids),
        "num_heads": len(unembeddings),
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "base_model_name_or_path": public_name(target),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_checkpoint(folder, tensors, config)
