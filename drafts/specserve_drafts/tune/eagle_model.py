"""A trainable EAGLE-3.1 head: the computation of `eagle.head.DraftHead`, differentiable.

One Llama layer over the target's fused auxiliary hidden states and the next token's embedding.
Parameter names are those of the checkpoint. Owns the training-time test (Li et al. 2025, arXiv
2503.01840, section 3.2): step k reads the head's own output of step k - 1, and attends to the draft
inputs with the target's hidden states up to the start of its chain and to its own chain, as in
serving.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specserve.models.layers.rotary import Rotary, rotate
from specserve_drafts.eagle.head_shape import HeadShape
from specserve_drafts.tune.eagle_batch import ChainBatch, Group


class Norm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:  # [..., size] -> float32 of the same shape
        return super().forward(x.float())


class Attention(nn.Module):
    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self._shape = shape
        width, dim = shape.first_width, shape.head_dim
        self.q_proj = nn.Linear(width, shape.num_heads * dim, bias=False)
        self.k_proj = nn.Linear(width, shape.num_kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(width, shape.num_kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * dim, shape.hidden_size, bias=False)

    def _heads(self, x: Tensor) -> Tensor:  # [n, heads * head_dim] -> [n, heads, head_dim]
        return x.view(len(x), -1, self._shape.head_dim)

    def query(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """[n, 2 * hidden_size] -> [n, num_heads, head_dim]"""
        return rotate(self._heads(self.q_proj(x)), angles)

    def key_value(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Each [n, num_kv_heads, head_dim]."""
        k = self._heads(self.k_proj(x))
        return rotate(k, angles), self._heads(self.v_proj(x))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=False)
        self.up_proj = nn.Linear(hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [n, hidden_size], same shape back
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        hidden, eps = shape.hidden_size, shape.rms_norm_eps
        self.input_layernorm = Norm(hidden, eps)
        self.hidden_norm = Norm(hidden, eps)
        self.post_attention_layernorm = Norm(hidden, eps)
        self.self_attn = Attention(shape)
        self.mlp = Mlp(hidden, shape.intermediate_size)

    def wide(self, embeds: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The input of attention [n, 2 * hidden_size], and the residual [n, hidden_size].

        embeds, rows: [n, hidden_size], embeddings and hidden states of the draft inputs.
        """
        normed = self.hidden_norm(rows)
        return torch.cat((self.input_layernorm(embeds), normed), -1), normed


class EagleHead(nn.Module):
    """The head. `shape` is one of `eagle_init.head_shape`; `depth` is the number of chain steps."""

    def __init__(self, shape: HeadShape, depth: int, device: torch.device) -> None:
        super().__init__()
        self.shape, self._depth = shape, depth
        sizes = [shape.target_hidden_size] * len(shape.aux_layers)
        self.fc_norm = nn.ModuleList(Norm(size, shape.rms_norm_eps) for size in sizes)
        self.fc = nn.Linear(sum(sizes), shape.hidden_size, bias=False)
        self.layers = nn.ModuleList([Layer(shape)])
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.to(device)
        # Chains that start near the end of a text continue past it.
        num_positions = shape.max_position_embeddings + depth
        self._rotary = Rotary(shape.rope, shape.head_dim, num_positions, device)

    def fuse(self, states: Tensor) -> Tensor:  # [n, num_aux * hidden_size] -> [n, hidden_size]
        parts = states.chunk(len(self.fc_norm), -1)
        normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
        rows: Tensor = self.fc(torch.cat(normed, -1))
        return rows

    def forward(self, batch: ChainBatch) -> Iterator[Tensor]:
        """Hidden states [M, hidden_size] of steps 0 to depth - 1, the inputs of the LM head."""
        (layer,) = self.layers
        assert isinstance(layer, Layer)
        wide, residual = layer.wide(batch.embeds, self.fuse(batch.aux_hidden_states))
        seen = _Seen(batch, *layer.self_attn.key_value(wide, self._rotary.angles(batch.positions)))
        # Only K and V are needed of draft inputs before a chain, as there is no second layer.
        wide, rows = wide[batch.starts], residual[batch.starts]
        embeds, positions = batch.embeds[batch.starts], batch.positions[batch.starts]
        for step in range(self._depth):
            angles = self._rotary.angles(positions + step)
            if step:
                wide, rows = layer.wide(embeds[batch.step_rows(step)], rows)
                seen.extend(*layer.self_attn.key_value(wide, angles))
            mixed = seen.attend(layer.self_attn.query(wide, angles), self.shape.head_dim**-0.5)
            x = rows + layer.self_attn.o_proj(mixed)
            rows = self.norm(x + layer.mlp(layer.post_attention_layernorm(x)))
            yield rows


class _Seen:
    """K and V that chains attend to: those of the draft inputs with the target's hidden states, and
    one entry per chain for each of its own steps after the first."""

    def __init__(self, batch: ChainBatch, k: Tensor, v: Tensor) -> None:
        """k, v: [N, num_kv_heads, head_dim], of the draft inputs with the target's states."""
        self._groups = batch.groups
        self._num_kv = k.shape[1]
        # By group, each [B, num_kv_heads, longest, head_dim].
        self._true = [
            (k[group.draft_inputs].transpose(1, 2), v[group.draft_inputs].transpose(1, 2))
            for group in batch.groups
        ]
        self._own: list[tuple[Tensor, Tensor]] = []  # by step, each [M, num_kv_heads, head_dim]

    def extend(self, k: Tensor, v: Tensor) -> None:
        """Add a step of all chains; k, v: [M, num_kv_heads, head_dim]."""
        self._own.append((k, v))

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Attend with one query per chain: [M, num_heads, head_dim] -> [M, num_heads * head_dim]"""
        q = torch.unflatten(q, 1, (self._num_kv, -1)) * scale  # [M, num_kv, heads each, head_dim]
        own = [(q * k[:, :, None]).sum(-1) for k, _ in self._own]
        scores = torch.stack(own, -1) if own else q[..., :0]  # [M, num_kv, heads each, steps]
        parts = [
            _attend(group, *true, q, scores)
            for group, true in zip(self._groups, self._true, strict=True)
        ]
        mixed = torch.cat([part for part, _ in parts])
        own_weights = torch.cat([part for _, part in parts])
        for step, (_, v) in enumerate(self._own):
            mixed = mixed + own_weights[..., step, None] * v[:, :, None]
        return mixed.flatten(1)


def _attend(
    group: Group,
    k: Tensor,  # [B, num_kv, longest, head_dim]
    v: Tensor,
    q: Tensor,  # [M, num_kv, heads each, head_dim]
    own: Tensor,  # [M, num_kv, heads each, steps], attention scores of the chain's own steps
) -> tuple[Tensor, Tensor]:
    """Attention of the group's chains over the target's draft inputs and over their own steps.

    Returns the weighted sum over the former [m, num_kv, heads each, head_dim], and the attention
    weights of the latter [m, num_kv, heads each, steps].
    """
    (_, most), longest, each = group.chains.shape, k.shape[2], q.shape[2]
    padded = q[group.chains].permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = torch.unflatten(padded @ k.transpose(2, 3), 2, (each, most))
    scores = scores.masked_fill(group.hidden[:, None, None], -torch.inf)
    scores = torch.cat((scores, own[group.chains].permute(0, 2, 3, 1, 4)), -1)
    weights = scores.float().softmax(-1).to(v.dtype)
    mixed = torch.unflatten(weights[..., :longest].flatten(2, 3) @ v, 2, (each, most))
    own_weights = weights[..., longest:]
    return _flat(mixed, group), _flat(own_weights, group)


def _flat(x: Tensor, group: Group) -> Tensor:
    """Drop padding: [B, num_kv, heads each, most, n] -> [m, num_kv, heads each, n]."""
    return x.permute(0, 3, 1, 2, 4).flatten(0, 1)[group.places]
