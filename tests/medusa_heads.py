"""Tiny random Medusa heads on disk, by the authors' names and by vLLM's, and what they compute."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import TINY_VOCAB
from torch import Tensor

HIDDEN, NUM_HEADS, NUM_LAYERS, MAPPED = 32, 3, 2, 40
# vLLM's files may have a head for all tokens beside the map of those that are drafted, and one
# unembedding for all heads.
LAYOUTS = ("authors", "vllm", "vllm_mapped", "vllm_mapped_whole", "vllm_mapped_shared")


@dataclass
class Medusa:
    """Heads, their tensors by the names of the file."""

    path: Path
    layout: str
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        save_file(self.tensors, self.path / "model.safetensors")
        (self.path / "config.json").write_text(json.dumps(self.config))


def write_medusa(directory: Path, layout: str = "authors", *, seed: int = 4) -> Medusa:
    """For the tiny target: width 32, 97 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul(shape[-1] ** -0.5)

    vocab = MAPPED if layout in ("vllm_mapped", "vllm_mapped_shared") else TINY_VOCAB
    tensors: dict[str, Tensor] = {}
    for head in range(NUM_HEADS):
        for layer in range(NUM_LAYERS):
            name = _layer_name(layout, head, layer)
            tensors[f"{name}.weight"] = weights(HIDDEN, HIDDEN)
            if layout != "vllm":
                tensors[f"{name}.bias"] = weights(HIDDEN)
        if head == 0 or not _shared(layout):
            tensors[_head_name(layout, head)] = weights(vocab, HIDDEN) * 3
    if layout.startswith("vllm_mapped"):
        tensors["token_map"] = torch.randperm(TINY_VOCAB, generator=generator)[:MAPPED]
    config: dict[str, Any] = {
        "medusa_num_heads": NUM_HEADS,
        "medusa_num_layers": NUM_LAYERS,
        "base_model_name_or_path": "someone/tiny",
    }
    if layout != "authors":
        config = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": HIDDEN,
            "vocab_size": TINY_VOCAB,
            "truncated_vocab_size": MAPPED if "token_map" in tensors else TINY_VOCAB,
            "num_heads": NUM_HEADS,
            "num_hidden_layers": NUM_LAYERS,
            "medusa_fc_bias": layout != "vllm",
            "original_lm_head": _shared(layout),
        }
    directory.mkdir(parents=True, exist_ok=True)
    medusa = Medusa(directory, layout, tensors, config)
    medusa.save()
    return medusa


def plain_logits(medusa: Medusa, row: Tensor) -> Tensor:
    """Of each head, over the target's vocabulary: [NUM_HEADS, TINY_VOCAB]. row: normed [HIDDEN]."""
    t = medusa.tensors
    logits = torch.full((NUM_HEADS, TINY_VOCAB), -torch.inf)
    for head in range(NUM_HEADS):
        x = row
        for layer in range(NUM_LAYERS):
            name = _layer_name(medusa.layout, head, layer)
            y = t[f"{name}.weight"] @ x + t.get(f"{name}.bias", torch.zeros(HIDDEN))
            x = x + y / (1 + torch.exp(-y))
        scores = t[_head_name(medusa.layout, head)] @ x
        tokens = t.get("token_map", torch.arange(TINY_VOCAB))
        logits[head, tokens] = scores if len(scores) == len(tokens) else scores[tokens]
    return logits


def _layer_name(layout: str, head: int, layer: int) -> str:
    return f"{head}.{layer}.linear" if layout == "authors" else f"blocks.{head}.layers.{layer}"


def _head_name(layout: str, head: int) -> str:
    owner = 0 if _shared(layout) else head
    return f"{owner}.{NUM_LAYERS}.weight" if layout == "authors" else f"lm_heads.{owner}.weight"


def _shared(layout: str) -> bool:
    return layout.endswith("_shared")
