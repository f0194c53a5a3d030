"""The forward pass of an EAGLE draft head.

A draft input is one position: the target's fused auxiliary hidden states of a token, and the next
token. For positions that the target has not computed, the head's own output takes the place of the
fused hidden states (Li et al. 2025, EAGLE-3, section 3; EAGLE-1 does the same with the target's
last hidden state). Rounding may differ between batch shapes, as a draft need not be exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from specserve.cache.storage import KVStorage
from specserve.models.layers.attention import Attention, AttentionInputs
from specserve.models.layers.linear import Linear
from specserve.models.layers.mlp import Mlp
from specserve.models.layers.norm import RMSNorm
from specserve.models.layers.rotary import Rotary
from specserve.models.quantization.dense import DenseMethod
from specserve.speculation.drafter import TargetLayers
from specserve_drafts.eagle.checkpoint import HeadCheckpoint
from specserve_drafts.eagle.head_shape import HeadShape, aux_norm_names
from specserve_kernels.decoder import DecoderPass
from specserve_kernels.ops import Kernels
from specserve_kernels.segments import Segments

_NO_ROWS = torch.empty(0, dtype=torch.int64)  # whose logits the pass computes


@dataclass(frozen=True, slots=True)
class HeadSegment:
    """One segment of a forward pass: nodes of a tree, or a chain of draft inputs."""

    # int32: slots of all draft inputs that the segment may attend to, in order. Its own are
    # slot_list[context_len + first_node:].
    slot_list: Tensor
    context_len: int  # draft inputs before the tree, or before the chain
    first_node: int  # nodes of the tree before the segment
    tokens: Sequence[int]
    positions: npt.NDArray[np.int64]  # [n] RoPE positions
    ancestors: npt.NDArray[np.uint64]  # [n] words, as in `DraftTree`


def build_head_batch(
    segments: Sequence[HeadSegment],
    hidden_states: Tensor,  # [num_rows, hidden_size], results of `fuse` or of a forward pass
    kv: KVStorage,
) -> DecoderPass:
    """The input of one forward pass over `segments`.

    Slot lists are passed as block tables with a block size of 1, so a missing range leaves no gap
    in what attention reads.
    """
    device = hidden_states.device
    lengths = [len(segment.tokens) for segment in segments]
    cu_rows = np.zeros(len(segments) + 1, np.int32)
    np.cumsum(lengths, out=cu_rows[1:])
    ends = [
        segment.context_len + segment.first_node + length
        for segment, length in zip(segments, lengths, strict=True)
    ]
    tables = np.zeros((len(segments), max(ends)), np.int32)
    slots = np.empty(cu_rows[-1], np.int64)
    for index, (segment, length, end) in enumerate(zip(segments, lengths, ends, strict=True)):
        slot_list = segment.slot_list.numpy()
        tables[index, :end] = slot_list[:end]
        slots[cu_rows[index] : cu_rows[index + 1]] = slot_list[end - length : end]
    ids = np.concatenate([np.asarray(segment.tokens, np.int64) for segment in segments])
    return DecoderPass(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(np.concatenate([segment.positions for segment in segments])).to(device),
        torch.from_numpy(slots).to(device),
        Segments(
            cu_rows=cu_rows,
            context_lens=np.array([segment.context_len for segment in segments], np.int32),
            first_nodes=np.array([segment.first_node for segment in segments], np.int32),
            ancestors=np.concatenate([segment.ancestors for segment in segments]),
            block_tables=tables,
            num_rows=int(cu_rows[-1]),
            block_size=1,
        ),
        kv.data,
        _NO_ROWS,
        hidden_in=hidden_states.contiguous(),
    )


class DraftHead:
    """One head, with the weights of `file` converted to `dtype`. Its methods are those of
    `QuantizedDraftHead`, in `dtype` instead of float32."""

    def __init__(
        self,
        file: HeadCheckpoint,
        kernels: Kernels,
        target: TargetLayers,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shape = shape = file.shape
        self._kernels, self._target, self._dtype = kernels, target, dtype
        weights = _Weights(file, dtype, device)
        self._rotary = Rotary(shape.rope, shape.head_dim, num_positions, device)
        if shape.own_embedding:
            self._embedding = weights.tensor("embed_tokens.weight")
        self._fc = weights.linear("fc", bias=shape.fc_bias)
        self._aux_norms = [weights.norm(name) for name in aux_norm_names(shape)]
        self._layers = [
            _Layer(shape, weights, f"layers.{index}", first=index == 0)
            for index in range(shape.num_layers)
        ]
        self._norm = weights.norm("norm") if shape.kind == "eagle3" else None
        self._head = weights.linear("lm_head", bias=False) if shape.own_head else None

    def fuse(self, states: Tensor) -> Tensor:
        """Auxiliary hidden states [n, num_aux_layers * target_hidden_size], in the order of
        `shape.aux_layers`, -> fused [n, hidden_size]."""
        shape = self._shape
        if shape.kind == "eagle1":
            return self._target.final_norm(states).to(self._dtype)
        parts = states.to(self._dtype).chunk(max(1, len(self._aux_norms)), dim=-1)
        normed = [norm(part) for norm, part in zip(self._aux_norms, parts, strict=False)]
        return self._fc(torch.cat(normed, dim=-1) if normed else parts[0])

    def __call__(self, batch: DecoderPass) -> Tensor:
        """Output hidden states [num_rows, hidden_size]; writes the draft inputs' K and V."""
        assert batch.hidden_in is not None
        shape = self._shape
        embeds = (
            F.embedding(batch.input_ids, self._embedding)
            if shape.own_embedding
            else self._target.embed(batch.input_ids).to(self._dtype)
        )
        x = batch.hidden_in
        if shape.kind == "eagle1":
            x = self._fc(torch.cat((embeds, x), dim=-1))
        plan = self._kernels.plan_attention(
            batch.segments, shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
        )
        angles = self._rotary.angles(batch.positions)
        inputs = AttentionInputs(self._kernels, plan, angles, batch.slots)
        for index, layer in enumerate(self._layers):
            x = layer(x, embeds, (batch.kv[index, 0], batch.kv[index, 1]), inputs)
        return self._norm(x) if self._norm is not None and shape.norm_output else x

    def write_kv(self, batch: DecoderPass) -> None:
        """Write the draft inputs' K and V; the output is not needed."""
        self(batch)

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits of the token after each draft input: [n, hidden_size], outputs of the forward
        pass, -> [n, draft_vocab_size] float32."""
        if self._norm is not None and not self._shape.norm_output:
            outputs = self._norm(outputs)
        head = self._head
        logits = self._target.unembed(outputs) if head is None else head(outputs).float()
        return logits * self._shape.logit_scale


class _Weights:
    """Reads tensors of a checkpoint as modules, in the head's dtype and on its device."""

    def __init__(self, file: HeadCheckpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._file, self._dtype, self._device = file, dtype, device

    def tensor(self, name: str) -> Tensor:
        return self._file.tensor(name).to(self._device, self._dtype).contiguous()

    def linear(self, *names: str, bias: bool) -> Linear:
        """Linear maps of the same input as one; their outputs follow one another."""
        weight = torch.cat([self.tensor(f"{name}.weight") for name in names])
        biases = [self.tensor(f"{name}.bias") for name in names] if bias else []
        return Linear(DenseMethod(weight), torch.cat(biases) if bias else None)

    def norm(self, name: str) -> RMSNorm:
        weight = self._file.tensor(f"{name}.weight").to(self._device, torch.float32)
        return RMSNorm(weight, self._file.shape.rms_norm_eps)


class _Layer:
    """A Llama layer, with `HeadShape`'s exceptions for the first layer of EAGLE-1 and EAGLE-3."""

    def __init__(self, shape: HeadShape, weights: _Weights, prefix: str, *, first: bool) -> None:
        self._norm_before_residual = shape.norm_before_residual
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        self._attention = Attention(
            weights.linear(*(f"{attention}.{kind}_proj" for kind in "qkv"), bias=shape.qkv_bias),
            weights.linear(f"{attention}.o_proj", bias=shape.o_bias),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            q_norm=weights.norm(f"{attention}.q_norm") if shape.qk_norm else None,
            k_norm=weights.norm(f"{attention}.k_norm") if shape.qk_norm else None,
        )
        self._mlp = Mlp(
            weights.linear(f"{mlp}.gate_proj", f"{mlp}.up_proj", bias=shape.mlp_bias),
            weights.linear(f"{mlp}.down_proj", bias=shape.mlp_bias),
            exact=False,
        )
        self._mlp_norm = weights.norm(f"{prefix}.post_attention_layernorm")
        self._input_norm = self._hidden_norm = None
        if shape.kind == "eagle3" or not first:
            self._input_norm = weights.norm(f"{prefix}.input_layernorm")
        if shape.kind == "eagle3" and first:
            self._hidden_norm = weights.norm(f"{prefix}.hidden_norm")

    def __call__(
        self, x: Tensor, embeds: Tensor, cache: tuple[Tensor, Tensor], inputs: AttentionInputs
    ) -> Tensor:  # [num_rows, hidden_size], as are `x` and `embeds`
        wide = x
        if self._hidden_norm is not None and self._input_norm is not None:
            normed = self._hidden_norm(x)
            wide = torch.cat((self._input_norm(embeds), normed), dim=-1)
            if self._norm_before_residual:
                x = normed
        elif self._input_norm is not None:
            wide = self._input_norm(x)
        x = x + self._attention(wide, cache, inputs)
        return x + self._mlp(self._mlp_norm(x))
