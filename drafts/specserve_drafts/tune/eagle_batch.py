"""Texts side by side: where each pair stands, and which of them start a chain.

Pair i of a text is the target's row of token i and token i + 1; a chain that starts at pair i
guesses tokens i + 2, i + 3, ... Chains start where serving has them start: from the last token of
the prompt on. Row a of a text's answer is both the chain that first guesses answer token a, and
the target's own distribution there; step k of chain a is about row a + k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specserve_drafts.tune.texts import Text

_GPU_GROUP: Final = 16


@dataclass(frozen=True, slots=True)
class Group:
    """Texts whose attention is one matrix product: B texts, m chains in all."""

    pairs: Tensor  # [B, longest] int64, the pairs of each text; anything past its end
    chains: Tensor  # [B, most] int64, the chains of each text; anything past its last
    places: Tensor  # [m] int64 into B * most
    hidden: Tensor  # [B, most, longest] bool, pairs after the chain's start


@dataclass(frozen=True, slots=True)
class ChainBatch:
    """N pairs and M chains, flat, one text after the other."""

    next_ids: Tensor  # [N] int64, the token of each pair
    positions: Tensor  # [N] int64, of the pairs in their texts
    starts: Tensor  # [M] int64, the pair that each chain starts from
    ids: Tensor  # [M] int64, the token of that pair
    left: Tensor  # [M] int64, answer tokens from here to the text's end
    groups: tuple[Group, ...]

    def step_rows(self, step: int) -> Tensor:
        """[M] int64: the row that each chain is about at `step`; the last one past the end."""
        rows = torch.arange(len(self.starts), device=self.starts.device)
        return rows + (self.left - 1).clamp_max(step)


def build_chains(
    texts: Sequence[Text], device: torch.device, per_group: int | None = None
) -> ChainBatch:
    """Prompts have two tokens or more, answers one or more. `per_group`: texts."""
    pairs = np.array([text.num_pairs for text in texts])
    chains = np.array([text.num_answer for text in texts])
    prompts = np.array([text.num_prompt for text in texts])
    first_pair, first_chain = np.cumsum(pairs) - pairs, np.cumsum(chains) - chains
    # [5, num_texts]: what `_group` needs of each.
    about = np.stack([first_pair, pairs, first_chain, chains, prompts])
    # A GPU wants few and large products; a CPU no padding, and scores that stay in its cache.
    size = per_group or (1 if device.type == "cpu" else _GPU_GROUP)
    groups = [
        _group(about[:, start : start + size], device) for start in range(0, len(texts), size)
    ]
    starts = [
        first + text.num_prompt - 2 + np.arange(text.num_answer)
        for first, text in zip(first_pair, texts, strict=True)
    ]
    flat = (
        np.concatenate([text.tokens[1:-1] for text in texts]).astype(np.int64),
        np.concatenate([np.arange(n) for n in pairs]),
        np.concatenate(starts),
        np.concatenate([t.tokens[t.num_prompt - 1 : -1] for t in texts]).astype(np.int64),
        np.concatenate([np.arange(n, 0, -1) for n in chains]),
    )
    next_ids, positions, first, ids, left = (_copy(array, device) for array in flat)
    return ChainBatch(
        next_ids,
        positions,
        first,
        ids,
        left,
        tuple(groups),
    )


def _group(about: npt.NDArray[np.int64], device: torch.device) -> Group:
    """`about`: [5, B], each text's first pair and number of pairs, its first chain and number of
    chains, and the length of its prompt."""
    longest, most = int(about[1].max()), int(about[3].max())
    places = np.flatnonzero(np.arange(most)[None] < about[3][:, None])
    first_pair, pairs, first_chain, chains, prompts = _copy(about, device)[:, :, None]
    column = torch.arange(longest, device=device)[None]
    row = torch.arange(most, device=device)[None]
    own = row < chains  # [B, most]
    start = torch.where(own, prompts - 2 + row, longest)  # padding sees everything
    return Group(
        torch.where(column < pairs, first_pair + column, 0),
        torch.where(own, first_chain + row, 0),
        _copy(places, device),
        column[None] > start[:, :, None],
    )


def _copy(array: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """Without waiting for what the device is at."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
