"""The token ids of the LM head rows of an EAGLE-3 head with a reduced vocabulary.

`d2t[i]` is an offset: row i stands for token i + d2t[i]. `t2d` marks the tokens that have a row.
Some published files have the token ids themselves in `d2t`. Read as offsets these would give wrong
tokens: drafts would never be accepted, without any error. So such files are detected and refused.
"""

from typing import Final

import torch
from torch import Tensor

_AGAIN: Final = "fetch the checkpoint again"
# `_has_no_neighbours` decides only if a random choice of tokens would have more than this many
# pairs of consecutive ids, so that having none is not chance.
_NEIGHBOURS: Final = 10


def token_ids_of(d2t: Tensor, t2d: Tensor | None, num_rows: int, vocab_size: int) -> Tensor:
    """The token id of each row, [num_rows] int64, all different.

    d2t: [num_rows], any dtype. t2d: [vocab_size], nonzero for tokens with a row, or None. Raises
    ValueError saying what is wrong and what to do.
    """
    if d2t.shape != (num_rows,):
        raise ValueError(
            f"d2t has shape {list(d2t.shape)}; config.json says draft_vocab_size {num_rows}; "
            f"{_AGAIN}"
        )
    offsets = d2t.to(torch.int64)
    if not torch.equal(offsets.to(torch.float64), d2t.to(torch.float64)):
        raise ValueError(f"d2t holds numbers that are not whole; {_AGAIN}")
    ids = offsets + torch.arange(num_rows)
    if t2d is not None and t2d.shape != (vocab_size,):
        raise ValueError(
            f"t2d has shape {list(t2d.shape)}; expected a mark for each of the target's "
            f"{vocab_size} tokens; use the draft that was made for this target"
        )
    # The tokens that have a row: [n] int64, ascending.
    marked = None if t2d is None else t2d.nonzero().flatten()
    problem = _problem(ids, marked, vocab_size)
    if _could_be_tokens(offsets, marked, vocab_size) and (
        problem is not None or (marked is None and _has_no_neighbours(offsets, vocab_size))
    ):
        raise ValueError(
            f"d2t looks like token ids ({', '.join(map(str, offsets[:3].tolist()))}, ...), but it "
            "has to hold what to add to a row's number: save d2t - torch.arange(len(d2t)) "
            "instead, and t2d beside it, which says for sure"
        )
    if problem is not None:
        raise ValueError(problem)
    return ids


def _problem(ids: Tensor, marked: Tensor | None, vocab_size: int) -> str | None:
    """Why `ids` cannot be the token ids of the rows; None: they can."""
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        return (
            f"d2t points to token {int(outside[0])}, outside the target's vocabulary of "
            f"{vocab_size}; use the draft that was made for this target"
        )
    ordered = ids.sort().values
    if not _is_ascending(ordered):
        return f"d2t names a token twice; {_AGAIN}"
    if marked is None and not torch.equal(ordered, ids):
        return f"d2t names tokens out of order, and there is no t2d to check it by; {_AGAIN}"
    if marked is not None and not torch.equal(ordered, marked):
        return (
            f"d2t names {len(ids)} tokens and t2d marks {len(marked)}, not all the same; {_AGAIN}"
        )
    return None


def _could_be_tokens(offsets: Tensor, marked: Tensor | None, vocab_size: int) -> bool:
    """Whether the values of `d2t` can be token ids."""
    ordered = offsets.sort().values
    if marked is not None:
        return torch.equal(ordered, marked)
    inside = len(ordered) > 0 and int(ordered[0]) >= 0 and int(ordered[-1]) < vocab_size
    return inside and _is_ascending(ordered)


def _has_no_neighbours(offsets: Tensor, vocab_size: int) -> bool:
    """Whether `d2t`, read as offsets, has no two consecutive rows with consecutive token ids.

    Such rows have equal offsets, and a real map of many tokens has some. The values 0, 1, 2, ... do
    not count: as token ids they would be the identity, for which no map is written.
    """
    count = len(offsets)
    in_order = torch.equal(offsets, torch.arange(count))
    return _is_ascending(offsets) and not in_order and count * count > _NEIGHBOURS * vocab_size


def _is_ascending(values: Tensor) -> bool:
    return bool((values.diff() > 0).all())
