"""Medusa heads that can be trained: `medusa.MedusaHeads` again, differentiable.

A head is one residual block and an unembedding of its own. Medusa-1 (Cai et al. 2024, arXiv
2401.10774) trains the latter whole, from the target's; here it is the target's times a square
matrix that learns, which has a tenth of the weights or less, and is one matrix again in the file.
The target's alone would not do: a residual block hardly takes anything away from its input.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specserve_drafts.tune.texts import Text

# The token that is told is what a head is sure of at first, and wrong: logits begin softer.
_SOFTER: Final = 0.2


@dataclass(frozen=True, slots=True)
class MedusaChains:
    """M chains, flat, one text after the other. The target's row that tells answer token a starts
    the chain that guesses a + 1, a + 2, ...; the last token of a text has nothing after it."""

    rows: Tensor  # [M, hidden_size] float32, normed as for the target's own head
    places: Tensor  # [M] int64, of those rows among the answer tokens of all texts
    left: Tensor  # [M] int64, answer tokens from the first guess to the text's end

    def step_rows(self, step: int) -> Tensor:
        """[M] int64: the answer token that each head guesses at `step`; the text's last one past
        its end."""
        return self.places + 1 + torch.minimum(self.left - 1, self.left.new_tensor(step))


def lay_out(
    texts: Sequence[Text],
    rows: Tensor,  # [num_answer_tokens, hidden_size] float32, normed
) -> MedusaChains:
    lengths = np.array([text.num_answer for text in texts])
    firsts = np.cumsum(lengths) - lengths
    places = [first + np.arange(n - 1) for first, n in zip(firsts, lengths, strict=True)]
    left = [np.arange(n - 1, 0, -1) for n in lengths]
    where = torch.from_numpy(np.concatenate(places)).to(rows.device)
    return MedusaChains(rows[where], where, torch.from_numpy(np.concatenate(left)).to(rows.device))


class ResidualBlock(nn.Module):
    """One layer, in a list for its name; it begins as nothing, as the authors' does."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:  # [n, hidden_size], same shape back
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x


class MedusaHeads(nn.Module):
    """At first every head guesses the token that the target has told."""

    def __init__(self, hidden_size: int, num_heads: int, device: torch.device) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(num_heads))
        self.mixes = nn.ParameterList(torch.eye(hidden_size) * _SOFTER for _ in range(num_heads))
        self.to(device)

    def forward(self, chains: MedusaChains) -> Iterator[Tensor]:
        """Rows [M, hidden_size] of each head in turn, ready for the target's own head."""
        for block, mix in zip(self.blocks, self.mixes, strict=True):
            yield F.linear(block(chains.rows), mix)

    def tensors(self, target_rows: Tensor) -> dict[str, Tensor]:
        """The weights under vLLM's names. `target_rows`: [draft_vocab, hidden_size], of the
        target's own head."""
        blocks = {f"blocks.{name}": tensor for name, tensor in self.blocks.state_dict().items()}
        unembeddings = [target_rows @ mix.detach() for mix in self.mixes]
        return blocks | {f"lm_heads.{i}.weight": rows for i, rows in enumerate(unembeddings)}
