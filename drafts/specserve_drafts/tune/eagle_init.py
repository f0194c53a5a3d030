"""Where a head begins: as the target's last layer over its own final row.

`fc` lets the last tap through, so that the first row is the one the target's head reads; the layer
has the weights of the target's last one on that half of its input, and noise on the half of the
embedding. With the last tap after the last layer, that is close to EAGLE-1 (Li et al. 2024).
"""

import torch
from torch import Tensor

from specserve.models.checkpoint import Checkpoint
from specserve.models.shape import ModelShape
from specserve_drafts.head_shape import HeadShape
from specserve_drafts.tune.eagle_model import EagleHead

_EMBEDDING_SHARE = 1.0  # standard deviation of the embedding's half, against the other half's
# The last row's own token is what the head is sure of at first, and wrong: logits begin softer.
_SOFTER = 0.5
_SMALLEST = 0.1  # of a norm's weights that are divided by, against their mean


def default_taps(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's low and middle layers, and what leaves the last one."""
    return tuple(sorted({min(2, num_layers - 1), num_layers // 2, num_layers}))


def head_shape(
    target: ModelShape, taps: tuple[int, ...], draft_vocab: int, mlp_size: int | None = None
) -> HeadShape:
    """One layer as wide as the target's, without biases, whatever the target has. `mlp_size`: its
    MLP is wider, or narrower."""
    return HeadShape(
        kind="eagle3",
        taps=taps,
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
        tap_norm="each",
        norm_before_residual=True,
        norm_output=True,
    )


@torch.no_grad()
def start_from_target(
    head: EagleHead, checkpoint: Checkpoint, target: ModelShape, last: Tensor, seed: int
) -> None:
    """Fill `head` in place. `last`: some rows [n, hidden_size] that leave the target's last layer;
    the layer works on rows of size 1, the target's on rows of their size. What is new in a wider
    MLP adds nothing yet."""
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
    if head.shape.taps[-1] == target.num_layers:
        normed = last.float().cpu() / last.float().cpu().square().mean(-1, keepdim=True).sqrt()
        row_size = (normed * final).square().mean(-1).sqrt().median()
        floor = final.abs().mean() * _SMALLEST
        divisor = torch.where(final < 0, -1.0, 1.0) * final.abs().clamp_min(floor)
        weights[f"fc_norm.{len(head.shape.taps) - 1}.weight"] = final
        weights["layers.0.hidden_norm.weight"] = row_size / divisor  # undoes the final norm's
    for kind in "qkv":
        name = f"self_attn.{kind}_proj"
        own = floats(name) * floats("input_layernorm")
        noise = torch.randn(own.shape, generator=generator) * own.std() * _EMBEDDING_SHARE
        weights[f"layers.0.{name}.weight"] = torch.cat((noise, own), -1)
    for kind in ("gate", "up"):
        weights[f"layers.0.mlp.{kind}_proj.weight"] = _fitted(
            floats(f"mlp.{kind}_proj"), head.shape.intermediate_size, generator
        )
    parameters = dict(head.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


def _fitted(rows: Tensor, num_rows: int, generator: torch.Generator | None) -> Tensor:
    """The first of `rows` [n, size], and what is missing to `num_rows` as noise of their size, or
    zero where there is no generator."""
    missing = max(0, num_rows - len(rows))
    more = torch.zeros(missing, rows.shape[1])
    if generator is not None:
        more = torch.randn(more.shape, generator=generator) * rows.std()
    return torch.cat((rows[:num_rows], more))
