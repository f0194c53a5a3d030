"""The kernel interface: the operations that every backend implements.

Knows tensors, but not sequences, draft trees or schedulers. The plain torch implementation in
`torch_ref` is the reference; `cases.py` holds the inputs on which backends are compared with it.
`segments` says what a row is. Whole models as one kernel are in `fused`.
"""

from typing import Protocol

from torch import Tensor

from specserve_kernels.packed_weight import PackedWeight
from specserve_kernels.segments import Segments


class Plan(Protocol):
    """What a backend derives from `Segments` once per forward pass; opaque to its callers."""


class Kernels(Protocol):
    """One backend: `torch_ref` (the reference implementation), `triton` or `cpu`.

    `exact` means that a row's result depends on its own inputs only: neither on the other rows of
    the launch nor on the node indices of its ancestors in the tree.
    """

    name: str
    exact: bool

    def plan_attention(self, segments: Segments, num_kv_heads: int, group_size: int) -> Plan:
        """Prepare `paged_tree_attention` for one pass. `group_size`: query heads per KV head."""
        ...

    def paged_tree_attention(
        self,
        q: Tensor,  # [num_rows, num_heads, head_dim]
        k_cache: Tensor,  # [num_slots, num_kv_heads, head_dim]
        v_cache: Tensor,  # [num_slots, num_kv_heads, head_dim]
        plan: Plan,
        *,
        scale: float,
        window: int = 0,
    ) -> Tensor:  # [num_rows, num_heads, head_dim], dtype of q
        """softmax(scale * q k) v over the slots that each row sees, accumulated in float32.

        q and the softmax weights are rounded to the dtype of the cache before they are multiplied
        with K and V. `window` > 0 (sliding window): a row at position p (context_len + depth) sees
        only positions above p - window. Entry b of a block table stands for the `block_size`
        consecutive slots of the cache that begin at b * block_size.
        """
        ...

    def packed_linear(
        self,
        x: Tensor,  # [num_rows, num_inputs] float32, contiguous
        weight: PackedWeight,  # [num_outputs, num_inputs]
    ) -> Tensor:  # [num_rows, num_outputs] float32
        """x W^T. If the weights are quantized, rows of x are first rounded to int8 in groups of 32
        inputs, with a scale each: see `torch_ref.linear`."""
        ...

    def kv_write(
        self,
        k: Tensor,  # [num_rows, num_kv_heads, head_dim]
        v: Tensor,  # [num_rows, num_kv_heads, head_dim]
        k_cache: Tensor,  # [num_slots, num_kv_heads, head_dim]
        v_cache: Tensor,  # [num_slots, num_kv_heads, head_dim]
        slots: Tensor,  # [num_rows] int64, -1: padding, not written
    ) -> None:
        """Write each row's K and V to its slot, in place."""
        ...

    def kv_commit(
        self,
        kv: Tensor,  # [num_layers, 2, num_slots, num_kv_heads, head_dim]
        src: Tensor,  # [num_moves] int64
        dst: Tensor,  # [num_moves] int64
    ) -> None:
        """Move slots src[i] -> dst[i] in every layer, in place, as if in ascending order of i.

        A destination may be the source of an EARLIER move, which has been read by then (as when
        an accepted path is compacted), but never the source of a later move.
        """
        ...

    def gumbel_noise(
        self,
        seeds: Tensor,  # [num_rows] int64
        positions: Tensor,  # [num_rows] int64
        token_ids: Tensor,  # [num_rows, num_tokens] int64
    ) -> Tensor:  # [num_rows, num_tokens] float32
        """Gumbel(0, 1) noise that is a function of (seed, position, token) alone.

        Philox4x32-10 (Salmon et al., SC'11) with key = the seed's low and high words and counter =
        (token // 4, position low word, position high word, 0); word token % 4 of the result, x,
        gives u = (x + 0.5) / 2**32 and the noise -log(-log(u)), computed in float64.
        """
        ...

    def gumbel_argmax(
        self,
        logits: Tensor,  # [num_rows, vocab_size] float32, -inf: token excluded
        seeds: Tensor,  # [num_rows] int64
        positions: Tensor,  # [num_rows] int64
        sampled: Tensor,  # [num_rows] bool, False: plain argmax
    ) -> Tensor:  # [num_rows] int64
        """argmax(logits + gumbel_noise) over the vocabulary; the lowest id wins a tie."""
        ...

    def apply_penalties(
        self,
        logits: Tensor,  # [num_rows, vocab_size] float32
        prompt_mask: Tensor,  # [num_rows, vocab_size] bool, token occurs in the prompt
        counts: Tensor,  # [num_rows, vocab_size] int32, occurrences in the output so far
        repetition: Tensor,  # [num_rows] float32, 1: off
        frequency: Tensor,  # [num_rows] float32, 0: off
        presence: Tensor,  # [num_rows] float32, 0: off
    ) -> Tensor:  # [num_rows, vocab_size] float32
        """A new tensor of penalized logits.

        First the repetition penalty for tokens of prompt and output (Keskar et al. 2019, section
        4.1: it divides positive logits and multiplies negative ones), then frequency * count and
        presence * (count > 0) are subtracted.
        """
        ...
