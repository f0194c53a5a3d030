"""The layout of a training batch: the draft inputs of several texts, and which of them start a
chain.

Draft input i of a text is the target's hidden state of token i with token i + 1; a chain that
starts at draft input i predicts tokens i + 2, i + 3, ... Chains start as in serving: the first one
predicts the first answer token. Chain a predicts answer token a at step 0; at step k its target is
the target model's distribution of answer token a + k, which is row a + k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specserve_drafts.tune.texts import Text

_GPU_GROUP: Final = 16  # texts of a `Group` on a GPU


@dataclass(frozen=True, slots=True)
class Group:
    """B texts with m chains in all, whose attention is computed as one padded matrix product."""

    draft_inputs: Tensor  # [B, longest] int64, indices of each text's draft inputs, padded
    chains: Tensor  # [B, most] int64, indices of each text's chains, padded
    places: Tensor  # [m] int64, indices into the flattened [B * most] that are not padding
    hidden: Tensor  # [B, most, longest] bool; True: masked, a draft input after the chain's start


@dataclass(frozen=True, slots=True)
class ChainBatch:
    """N draft inputs and M chains, one text after the other; a chain per answer token."""

    aux_hidden_states: Tensor  # [N, num_aux_layers * hidden_size]
    embeds: Tensor  # [N, hidden_size], the target's embedding of the token of each draft input
    positions: Tensor  # [N] int64, RoPE positions of the draft inputs in their texts
    starts: Tensor  # [M] int64, the draft input that each chain starts from
    left: Tensor  # [M] int64, answer tokens from the chain's first to the text's end
    groups: tuple[Group, ...]

    def step_rows(self, step: int) -> Tensor:
        """See `head_training.Chains`."""
        rows = torch.arange(len(self.starts), device=self.starts.device)
        return rows + (self.left - 1).clamp_max(step)


def build_chains(
    texts: Sequence[Text],
    aux_hidden_states: Tensor,  # [N, num_aux_layers * hidden_size]
    embed: Callable[[Tensor], Tensor],  # the target's, [n] int64 -> [n, hidden_size]
    per_group: int | None = None,
) -> ChainBatch:
    """The batch of `texts`. Each prompt must have at least two tokens, each answer at least one.

    per_group: texts of a group; None: 1 on a CPU, _GPU_GROUP on a GPU.
    """
    device = aux_hidden_states.device
    draft_inputs = np.array([text.num_draft_inputs for text in texts])
    chains = np.array([text.num_answer for text in texts])
    prompts = np.array([text.num_prompt for text in texts])
    first_input, first_chain = np.cumsum(draft_inputs) - draft_inputs, np.cumsum(chains) - chains
    # [5, num_texts], see `_group`.
    about = np.stack([first_input, draft_inputs, first_chain, chains, prompts])
    # A GPU is faster with few large products; a CPU without padding, and with attention scores that
    # stay in its cache.
    size = per_group or (1 if device.type == "cpu" else _GPU_GROUP)
    starts = [
        first + text.num_prompt - 2 + np.arange(text.num_answer)
        for first, text in zip(first_input, texts, strict=True)
    ]
    next_ids = np.concatenate([text.tokens[1:-1] for text in texts]).astype(np.int64)
    return ChainBatch(
        aux_hidden_states,
        embed(_copy(next_ids, device)),
        _copy(np.concatenate([np.arange(n) for n in draft_inputs]), device),
        _copy(np.concatenate(starts), device),
        _copy(np.concatenate([np.arange(n, 0, -1) for n in chains]), device),
        tuple(_group(about[:, i : i + size], device) for i in range(0, len(texts), size)),
    )


def _group(about: npt.NDArray[np.int64], device: torch.device) -> Group:
    """about: [5, B], of each text the first draft input and their number, the first chain and their
    number, and the length of the prompt."""
    longest, most = int(about[1].max()), int(about[3].max())
    places = np.flatnonzero(np.arange(most)[None] < about[3][:, None])
    first_input, draft_inputs, first_chain, chains, prompts = _copy(about, device)[:, :, None]
    column = torch.arange(longest, device=device)[None]
    row = torch.arange(most, device=device)[None]
    own = row < chains  # [B, most]
    start = torch.where(own, prompts - 2 + row, longest)  # padding is not masked
    return Group(
        torch.where(column < draft_inputs, first_input + column, 0),
        torch.where(own, first_chain + row, 0),
        _copy(places, device),
        column[None] > start[:, :, None],
    )


def _copy(array: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy to the device without waiting for its running work."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
