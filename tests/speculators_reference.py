"""EAGLE-3 as the package `speculators` computes it, for making and checking golden tensors.

Nothing that `make test` runs imports this: the package wants a venv of its own.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from speculators.models.eagle3 import (
    Eagle3DraftModel,
    Eagle3SpeculatorConfig,
)
from torch import Tensor

WEIGHTS = "model.safetensors"
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"


def load_reference(path: Path, target: Path | None = None) -> Any:
    """The head in `path`, in float32. `target`: where its target lies, if not where it says."""
    config = Eagle3SpeculatorConfig.from_pretrained(path)
    if target is not None:
        config.speculators_config.verifier.name_or_path = str(target)
    # The default attention needs a compiler, or a multiple of 128 tokens.
    config.transformer_layer_config._attn_implementation = "eager"
    model = Eagle3DraftModel.from_pretrained(path, config=config, dtype=torch.float32).eval()
    with safe_open(path / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
    # What is the target's NaN tells speculators to read there; but transformers gives what a file
    # lacks fresh memory, whatever was there.
    lacking = {EMBEDDING: model.embed_tokens, HEAD: model.lm_head}
    for name, module in lacking.items():
        if name not in names:
            module.weight.data.fill_(torch.nan)
    if not lacking.keys() <= names:
        model.load_verifier_weights()
    return model


def reference_logits(
    model: Any,
    ids: Tensor,  # [n] int64
    states: Tensor,  # [n, num_aux_layers * hidden_size]
    num_steps: int,
) -> list[Tensor]:
    """The logits of each step [n - step, draft_vocab_size], by the training-time test of
    speculators, which computes all chains of a text together.

    Draft input i is hidden state i and token i; step k of the chain that begins with it takes token
    i + k.
    """
    steps: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, output: steps.append(output[0]))
    with torch.no_grad():
        document = torch.zeros(1, len(ids), dtype=torch.int64)
        model(states[None], ids[None], document, ttt_steps=num_steps)
    hook.remove()
    return [rows[: len(ids) - step].clone() for step, rows in enumerate(steps)]
