"""Trainable Medusa heads: the computation of `medusa.MedusaHeads`, differentiable.

A head is one residual block and an unembedding of its own. Medusa-1 (Cai et al. 2024, arXiv
2401.10774) trains the whole unembedding, starting from the target's. Here it is the target's times
a trained square matrix, which has far fewer weights; the file contains the product. With the
target's fixed unembedding alone a head learns next to nothing, as a residual block can hardly
remove anything from its input (drafts/LOG.md, 2026-11-26).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specserve_drafts.tune.texts import Text

# Scale of the initial square matrices. An untrained head predicts the token that the target has
# predicted already, which is wrong; a small scale makes it less confident of that token
# (drafts/LOG.md, 2026-11-26).
_SOFTER: Final = 0.2


@dataclass(frozen=True, slots=True)
class MedusaChains:
    """M chains, one text after the other.

    A chain starts at the target's hidden state that predicts answer token a, and its heads predict
    the answer tokens a + 1, a + 2, ... The last answer token of a text starts no chain.
    """

    rows: Tensor  # [M, hidden_size] float32, those hidden states after the target's final norm
    places: Tensor  # [M] int64, their answer tokens a, counted over all texts
    left: Tensor  # [M] int64, answer tokens from a + 1 to the text's end

    def step_rows(self, step: int) -> Tensor:
        """See `head_training.Chains`."""
        return self.places + 1 + torch.minimum(self.left - 1, self.left.new_tensor(step))


def lay_out(
    texts: Sequence[Text],
    rows: Tensor,  # [num_answer_tokens, hidden_size] float32, after the final norm
) -> MedusaChains:
    """The chains of `texts`; `rows` has the hidden states that predict their answer tokens."""
    lengths = np.array([text.num_answer for text in texts])
    firsts = np.cumsum(lengths) - lengths
    places = [first + np.arange(n - 1) for first, n in zip(firsts, lengths, strict=True)]
    left = [np.arange(n - 1, 0, -1) for n in lengths]
    where = torch.from_numpy(np.concatenate(places)).to(rows.device)
    return MedusaChains(rows[where], where, torch.from_numpy(np.concatenate(left)).to(rows.device))


class ResidualBlock(nn.Module):
    """x + silu(W x + b), with W = 0 and b = 0 at first, as in the authors' code.

    The layer is in a list to have its name in the checkpoint.
    """

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
    """All heads. Untrained, each predicts the token that the target has predicted already."""

    def __init__(self, hidden_size: int, num_heads: int, device: torch.device) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(num_heads))
        self.mixes = nn.ParameterList(torch.eye(hidden_size) * _SOFTER for _ in range(num_heads))
        self.to(device)

    def forward(self, chains: MedusaChains) -> Iterator[Tensor]:
        """The outputs [M, hidden_size] of each head in turn, inputs of the target's LM head."""
        for block, mix in zip(self.blocks, self.mixes, strict=True):
            yield F.linear(block(chains.rows), mix)

    def tensors(self, target_rows: Tensor) -> dict[str, Tensor]:
        """The weights by vLLM's names. target_rows: [draft_vocab, hidden_size], rows of the
        target's LM head."""
        blocks = {f"blocks.{name}": tensor for name, tensor in self.blocks.state_dict().items()}
        unembeddings = [target_rows @ mix.detach() for mix in self.mixes]
        return blocks | {f"lm_heads.{i}.weight": rows for i, rows in enumerate(unembeddings)}
