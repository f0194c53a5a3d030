"""Describes the rows of one forward pass to the attention kernels, on the host.

Rows. A forward pass computes `num_rows` tokens; each is one row of the activation tensors. Rows are
grouped into segments of 1 to 64 consecutive rows. A segment is a token tree, or the last nodes of
one, that follows a committed context. Row j of a segment is tree node i = first_node + j. Its K and
V belong in position slot `context_len + i` of the segment's block table. The row attends to the
`context_len` slots before the tree and to the nodes whose bits are set in its ancestor word; K and
V of nodes before first_node are in the cache already. A plain decode step is a tree of one node. A
prefill chunk is split into chains of up to 64 tokens; each has all tokens before it as context.
Kernels do not distinguish these cases.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

MAX_SEGMENT_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of one forward pass, on the host; `plan_attention` is called once per pass.

    Rows from `cu_rows[-1]` on are padding: they attend to nothing and their attention is zero.
    """

    cu_rows: npt.NDArray[np.int32]  # [num_segments + 1], first row of each segment
    context_lens: npt.NDArray[np.int32]  # [num_segments], slots before the segment's tree
    first_nodes: npt.NDArray[np.int32]  # [num_segments], node index of the first row
    ancestors: npt.NDArray[np.uint64]  # [cu_rows[-1]], bit i: node i is the row's or an ancestor
    block_tables: npt.NDArray[np.int32]  # [num_segments, max_blocks], padded with 0
    num_rows: int  # rows of the forward pass, padding included
    block_size: int  # slots per block
