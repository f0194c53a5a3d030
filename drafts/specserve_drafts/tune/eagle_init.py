"""The initial weights of an EAGLE head: the target's last layer, reading its last hidden state.

`fc` passes the last auxiliary hidden state through and ignores the others. The head's layer has the
weights of the target's last layer for that half of its input, and random weights of the same
standard deviation for the half with the token embedding. If the last auxiliary hidden state is the
output of the last layer, this is close to EAGLE-1 (Li et al. 2024).
"""

import torch
from torch import Tensor

from specserve.models.checkpoint import Checkpoint
from specserve.models.shape import ModelShape
from specserve_drafts.eagle.head_shape import HeadShape
from specserve_drafts.tune.eagle_model import EagleHead

# Scale of the initial output norm. An untrained head predicts the token that the target has
# predicted already, which is wrong; a small scale makes it less confident of that token
# (drafts/LOG.md, 2026-11-25).
_SOFTER = 0.5
# Lower bound of the final norm's weights as divisors, relative to their mean absolute value.
_SMALLEST = 0.1


def default_aux_layers(num_layers: int) -> tuple[int, ...]:
    """The layers whose input hidden states a head reads by default: EAGLE-3's low and middle ones,
    and num_layers, the output of the last layer."""
    return tuple(sorted({min(2, num_layers - 1), num_layers // 2, num_layers}))


def head_shape(
    target: ModelShape, aux_layers: tuple[int, ...], draft_vocab: int, mlp_size: int | None = None
) -> HeadShape:
    """The shape of a head with one layer of the target's sizes, without biases.

    mlp_size: the width inside its MLP; None: the target's.
    """
    return HeadShape(
        kind="eagle3",
        aux_layers=aux_layers,
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        intermediate_size=mlp_size or target.intermediate_size,
        num_layers=1,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        rms_norm_eps=target.rms_norm_eps,
        rope=target.rope,
        max_position_embeddings=target.max_position_embeddings,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab,
        aux_norm="each",
        norm_before_residual=True,
        norm_output=True,
    )


@torch.no_grad()
def start_from_target(
    head: EagleHead, checkpoint: Checkpoint, target: ModelShape, last: Tensor, seed: int
) -> None:
    """Set the weights of `head` in place.

    last: [n, hidden_size], some outputs of the target's last layer. Their median RMS scales the
    layer's output weights, as the head's residual has an RMS of about 1. Additional units of a
    wider MLP have zero output weights at first.
    """
    prefix = f"model.layers.{target.num_layers - 1}"

    def floats(name: str) -> Tensor:
        return checkpoint.floats(f"{prefix}.{name}.weight").float()

    generator = torch.Generator().manual_seed(seed)
    final = checkpoint.floats("model.norm.weight").float()
    size = last.float().square().mean(-1).sqrt().median().item()
    weights = {
        "norm.weight": _SOFTER * final,
        "layers.0.post_attention_layernorm.weight": floats("post_attention_layernorm"),
        "layers.0.self_attn.o_proj.weight": floats("self_attn.o_proj") / size,
        "layers.0.mlp.down_proj.weight": _fitted(
            floats("mlp.down_proj").T / size, head.shape.intermediate_size, None
        ).T,
    }
    width = target.hidden_size
    fc = torch.zeros_like(head.fc.weight, device="cpu")
    fc[:, -width:] = torch.eye(width)
    weights["fc.weight"] = fc
    if head.shape.aux_layers[-1] == target.num_layers:
        normed = last.float().cpu() / last.float().cpu().square().mean(-1, keepdim=True).sqrt()
        row_size = (normed * final).square().mean(-1).sqrt().median()
        floor = final.abs().mean() * _SMALLEST
        divisor = torch.where(final < 0, -1.0, 1.0) * final.abs().clamp_min(floor)
        weights[f"fc_norm.{len(head.shape.aux_layers) - 1}.weight"] = final
        weights["layers.0.hidden_norm.weight"] = row_size / divisor  # cancels the final norm's
    for kind in "qkv":
        name = f"self_attn.{kind}_proj"
        own = floats(name) * floats("input_layernorm")
        noise = torch.randn(own.shape, generator=generator) * own.std()
        weights[f"layers.0.{name}.weight"] = torch.cat((noise, own), -1)
    for kind in ("gate", "up"):
        weights[f"layers.0.mlp.{kind}_proj.weight"] = _fitted(
            floats(f"mlp.{kind}_proj"), head.shape.intermediate_size, generator
        )
    parameters = dict(head.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


def _fitted(rows: Tensor, num_rows: int, generator: torch.Generator | None) -> Tensor:
    """`rows` [n, size], cut or extended to `num_rows` rows. Added rows are random with the standard
    deviation of `rows`, or zero if there is no generator."""
    missing = max(0, num_rows - len(rows))
    more = torch.zeros(missing, rows.shape[1])
    if generator is not None:
        more = torch.randn(more.shape, generator=generator) * rows.std()
    return torch.cat((rows[:num_rows], more))
