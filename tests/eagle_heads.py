"""Tiny random EAGLE heads on disk, as each publisher writes them, and what they compute.

The forward here is written from the papers' definition: whole attention matrices, no cache.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import TINY_VOCAB
from torch import Tensor

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 32, 48, 4, 2, 16
LAYOUTS = ("eagle1", "official", "specforge", "eagle31", "speculators", "speculators_qwen3")
# What each file says about its layers, for a target of two.
IDS: dict[str, dict[str, Any]] = {
    "eagle1": {},
    "official": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]},
    "specforge": {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [-1, 0, 1]}},
    "eagle31": {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, -1]}},
    "speculators": {"eagle_aux_hidden_state_layer_ids": [2, 0, 1]},
    "speculators_qwen3": {"eagle_aux_hidden_state_layer_ids": [0, 2]},
}
AUX_LAYERS = {  # layers entered
    "eagle1": (2,),
    "official": (0, 1, 2),
    "specforge": (0, 1, 2),
    "eagle31": (1, 2, 0),
    "speculators": (2, 0, 1),
    "speculators_qwen3": (0, 2),
}


@dataclass
class Written:
    """A head, and the tensors by the names of EAGLE-3's authors, layers by number."""

    path: Path
    layout: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    flags: dict[str, bool] = field(default_factory=dict)

    @property
    def token_ids(self) -> Tensor:
        if "d2t" not in self.tensors:
            return torch.arange(TINY_VOCAB)
        ids: Tensor = self.tensors["d2t"] + torch.arange(len(self.tensors["d2t"]))
        return ids


def write_eagle(directory: Path, layout: str, *, seed: int = 3, inner: int = INNER) -> Written:
    """For the tiny target: 2 layers of width 32, 97 tokens. `inner` of 64 can be quantised."""
    generator = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul(shape[-1] ** -0.5)

    def norm(size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    qwen = layout == "speculators_qwen3"
    num_layers = 2 if qwen else 1
    draft_vocab = 40
    tensors: dict[str, Tensor] = {}
    for index in range(num_layers):
        width = 2 * HIDDEN if index == 0 and layout != "eagle1" else HIDDEN
        prefix = f"layers.{index}."
        sizes = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, width),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, width),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, width),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (inner, HIDDEN),
            "mlp.up_proj": (inner, HIDDEN),
            "mlp.down_proj": (HIDDEN, inner),
        }
        tensors |= {f"{prefix}{name}.weight": weights(*size) for name, size in sizes.items()}
        if layout == "specforge":
            tensors |= {f"{prefix}self_attn.{x}_proj.bias": weights(KV_HEADS * 16) for x in "kv"}
            tensors[f"{prefix}self_attn.q_proj.bias"] = weights(HEADS * HEAD_DIM)
            tensors[f"{prefix}self_attn.o_proj.bias"] = weights(HIDDEN)
        if qwen:
            tensors |= {f"{prefix}self_attn.{x}_norm.weight": norm(HEAD_DIM) for x in "qk"}
        tensors[f"{prefix}post_attention_layernorm.weight"] = norm(HIDDEN)
        if layout != "eagle1":
            tensors[f"{prefix}input_layernorm.weight"] = norm(HIDDEN)
        if layout != "eagle1" and index == 0:
            tensors[f"{prefix}hidden_norm.weight"] = norm(HIDDEN)
    num_aux_layers = len(AUX_LAYERS[layout])
    if layout == "eagle1":
        tensors["fc.weight"], tensors["fc.bias"] = weights(HIDDEN, 2 * HIDDEN), weights(HIDDEN)
    else:
        tensors["fc.weight"] = weights(HIDDEN, num_aux_layers * HIDDEN)
        tensors["norm.weight"] = norm(HIDDEN)
        tensors["lm_head.weight"] = weights(draft_vocab, HIDDEN) * 3
        ids = torch.randperm(TINY_VOCAB, generator=generator)[:draft_vocab].sort().values
        tensors["d2t"] = ids - torch.arange(draft_vocab)
        tensors["t2d"] = torch.zeros(TINY_VOCAB, dtype=torch.bool).index_fill(0, ids, True)
    if layout == "eagle1" or layout.startswith("speculators"):
        tensors["embed_tokens.weight"] = weights(TINY_VOCAB, HIDDEN) * 5
    if layout == "eagle31":
        tensors |= {f"fc_norm.{i}.weight": norm(HIDDEN) for i in range(num_aux_layers)}
    if qwen:
        tensors["input_norm.weight"] = norm(num_aux_layers * HIDDEN)
    flags = {
        "norm_output": layout == "eagle31",
        "norm_before_residual": layout == "speculators",
    }
    config = _config(layout, num_layers, draft_vocab, inner)
    directory.mkdir(parents=True, exist_ok=True)
    written = Written(directory, layout, tensors, config, flags)
    save(written)
    return written


def save(written: Written) -> None:
    """Tensors and config as they are now, under the names of their layout."""
    first = "midlayer." if written.layout in ("official", "specforge", "eagle31") else "layers.0."
    file = {name.replace("layers.0.", first): t for name, t in written.tensors.items()}
    save_file({k: t.contiguous() for k, t in file.items()}, written.path / "model.safetensors")
    (written.path / "config.json").write_text(json.dumps(written.config))


def _config(layout: str, num_layers: int, draft_vocab: int, inner: int) -> dict[str, Any]:
    layer = {
        "model_type": "qwen3" if layout == "speculators_qwen3" else "llama",
        "vocab_size": TINY_VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": inner,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
    }
    if layout == "eagle1":
        return {"architectures": ["LlamaForCausalLM"], **layer}
    top: dict[str, Any] = {"draft_vocab_size": draft_vocab, **IDS[layout]}
    if layout == "official":
        return {"architectures": ["LlamaForCausalLM"], **layer, **top}
    if layout in ("specforge", "eagle31"):
        new = {"fc_norm": True, "norm_output": True} if layout == "eagle31" else {}
        return {"architectures": ["LlamaForCausalLMEagle3"], **layer, **top, **new}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layer,
        **({"norm_before_residual": False} if layout == "speculators_qwen3" else {}),
        **({"norm_before_fc": True} if layout == "speculators_qwen3" else {}),
        **top,
    }


def plain_logits(
    head: Written,
    target: dict[str, Tensor],
    states: Tensor,  # [n, num_aux_layers * HIDDEN], of all tokens but the last
    tokens: list[int],  # [n + 1]
    path: list[int],
) -> Tensor:
    """[len(path) + 1, draft vocabulary]: after the tokens, and after each token of the path."""
    rows = list(_fused(head, target, states).unbind())
    text = tokens[1:]
    logits = []
    for token in [None, *path]:
        text = text if token is None else [*text, token]
        out = _forward(head, target, text, torch.stack(rows))[-1]
        normed = out
        if head.layout != "eagle1" and not head.flags["norm_output"]:
            normed = _norm(out, head.tensors["norm.weight"])
        weight = head.tensors.get("lm_head.weight", target["lm_head.weight"])
        logits.append(weight @ normed)
        rows.append(out)
    return torch.stack(logits)


def _fused(head: Written, target: dict[str, Tensor], states: Tensor) -> Tensor:
    if head.layout == "eagle1":
        return _norm(states, target["model.norm.weight"])
    if head.layout == "eagle31":
        norms = [head.tensors[f"fc_norm.{i}.weight"] for i in range(3)]
        parts = zip(states.chunk(3, -1), norms, strict=True)
        states = torch.cat([_norm(x, w) for x, w in parts], -1)
    if "input_norm.weight" in head.tensors:
        states = _norm(states, head.tensors["input_norm.weight"])
    return states @ head.tensors["fc.weight"].T


def _forward(head: Written, target: dict[str, Tensor], text: list[int], rows: Tensor) -> Tensor:
    t = head.tensors
    embeds = t.get("embed_tokens.weight", target["model.embed_tokens.weight"])[text]
    x = rows
    if head.layout == "eagle1":
        x = torch.cat((embeds, rows), -1) @ t["fc.weight"].T + t["fc.bias"]
    for index in range(
        head.config.get("transformer_layer_config", head.config)["num_hidden_layers"]
    ):
        p = f"layers.{index}."
        wide, residual = x, x
        if head.layout != "eagle1" and index == 0:
            normed = _norm(x, t[p + "hidden_norm.weight"])
            wide = torch.cat((_norm(embeds, t[p + "input_layernorm.weight"]), normed), -1)
            residual = normed if head.flags["norm_before_residual"] else x
        elif index:
            wide = _norm(x, t[p + "input_layernorm.weight"])
        x = residual + _attention(t, p + "self_attn.", wide)
        y = _norm(x, t[p + "post_attention_layernorm.weight"])
        gate, up, down = (t[f"{p}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T
    return _norm(x, t["norm.weight"]) if head.flags["norm_output"] else x


def _attention(t: dict[str, Tensor], p: str, x: Tensor) -> Tensor:
    def project(name: str) -> Tensor:
        y = F.linear(x, t[f"{p}{name}_proj.weight"], t.get(f"{p}{name}_proj.bias"))
        return y.view(len(x), -1, HEAD_DIM).transpose(0, 1)

    q, k, v = project("q"), project("k"), project("v")
    if p + "q_norm.weight" in t:
        q, k = _norm(q, t[p + "q_norm.weight"]), _norm(k, t[p + "k_norm.weight"])
    q, k = _rotated(q), _rotated(k)
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, 0) for y in (k, v))
    hidden = torch.ones(len(x), len(x)).triu(1).bool()
    scores = (q @ k.transpose(1, 2) / HEAD_DIM**0.5).masked_fill(hidden, -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return F.linear(mixed, t[p + "o_proj.weight"], t.get(p + "o_proj.bias"))


def _rotated(x: Tensor) -> Tensor:  # [heads, n, HEAD_DIM]
    steps = 5000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.cat(2 * [torch.arange(x.shape[1])[:, None] * steps], -1)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
