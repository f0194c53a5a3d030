"""THE contract: what every backend implements, and the data the kernels share.

Knows tensors and nothing of sequences, trees or schedulers. The torch twin in `torch_ref` is the
definition; `cases.py` holds the shapes on which every backend is compared with it.

Rows. A pass runs `num_rows` tokens, grouped into segments of 1 to 64 rows that follow one another.
A segment is a token tree hanging from a committed context, or the end of one: its row j is node
i = first_node + j, is written to position slot `context_len + i` of the segment's block table, and
sees the `context_len` slots before the tree plus those nodes whose bit is set in its ancestor word;
nodes before first_node are in the cache already. A plain decode step is a tree of one node, a
prefill chunk is one chain per 64 tokens, each seeing the chains before it as context. Nothing below
this line knows the difference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

if TYPE_CHECKING:
    from specserve_kernels.decoder import DecoderWeights, PackedDecoder
    from specserve_kernels.draft_head import DraftHeadWeights, PackedDraftHead

MAX_SEGMENT_ROWS = 64


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of one pass, on the host. Built once per pass, planned once, used by all layers.

    Rows from `cu_rows[-1]` to `num_rows` are padding: they attend to nothing and come out as zero.
    """

    cu_rows: npt.NDArray[np.int32]  # [num_segments + 1], first row of each segment
    context_lens: npt.NDArray[np.int32]  # [num_segments], slots before the segment's first row
    first_nodes: npt.NDArray[np.int32]  # [num_segments], tree node of the segment's first row
    ancestors: npt.NDArray[np.uint64]  # [cu_rows[-1]], bit i: node i of the tree is self or above
    block_tables: npt.NDArray[np.int32]  # [num_segments, max_blocks], padded with 0
    num_rows: int  # rows of the pass, padding included
    block_size: int  # slots per block


class Plan(Protocol):
    """What a backend derives from `Segments` once per pass; opaque to everyone else."""


class Kernels(Protocol):
    """One backend: `torch_ref` (the definition), `triton`, `cpu`.

    `exact` says that a row's result depends on its own inputs only: not on the other rows of the
    launch, nor on where in the tree its ancestors lie.
    """

    name: str
    exact: bool

    @property
    def packed_decoder(self) -> "Callable[[DecoderWeights], PackedDecoder] | None":
        """Makes a model with packed weights ready to run; None: this backend has no such kernel."""
        ...

    @property
    def packed_draft_head(self) -> "Callable[[DraftHeadWeights], PackedDraftHead] | None":
        """The same for a draft head; a backend has both or neither."""
        ...

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
        """softmax(scale * q k) v over the slots each row sees, accumulated in float32.

        q and the weights of v are rounded to the dtype of the cache before they meet it.
        `window` > 0 (sliding window): a row at position p (context_len + depth) sees only
        positions above p - window. Block b of a table is slots b*block_size .. of the cache.
        """
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
        """Move slots src[i] -> dst[i] in every layer, in place, as if in ascending i.

        A destination may be the source of an EARLIER move (an accepted path closing up: by then
        it has been read), never of a later one.
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
        logits: Tensor,  # [num_rows, vocab_size] float32, -inf: not allowed
        seeds: Tensor,  # [num_rows] int64
        positions: Tensor,  # [num_rows] int64
        noisy: Tensor,  # [num_rows] bool, False: plain argmax
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
        """Repetition over prompt and output (Keskar et al. 2019, section 4.1: divide a positive
        logit, multiply a negative one), then minus frequency * count and presence * (count > 0)."""
        ...
