"""The `medusa` drafter: several heads over the target's last hidden state (Medusa, Cai et al. 2024,
arXiv 2401.10774).

The heads read the hidden state of the last committed token after the target's final norm, from
which the target's LM head predicted the root. Head i (from 0) predicts the token i + 1 positions
after the root, independently of the tokens in between. So all nodes of one depth have the same
candidate children; the tree is grown best-first by the product of the heads' probabilities, where
the authors use a fixed tree shape. At temperature T > 0 candidates are ranked by log q / T + g with
the target's Gumbel noise g.
"""

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from specserve.cache.storage import KVSpec
from specserve.models.fields import ModelError
from specserve.models.shape import ModelShape
from specserve.sampling import Row
from specserve.sequence import SequenceView
from specserve.speculation.drafter import (
    DraftContext,
    DraftError,
    DraftOptions,
    Feedback,
    NodeCount,
)
from specserve.tree import DraftTree, build_tree
from specserve_drafts.medusa.checkpoint import read_medusa
from specserve_drafts.medusa.heads import MedusaHeads

Candidates = Sequence[tuple[int, float]]  # tokens and their probabilities at one depth, best first


class MedusaOptions(DraftOptions, frozen=True, forbid_unknown_fields=True):
    branching: NodeCount = 8  # candidates kept per depth; 1 drafts a chain
    num_heads: NodeCount | None = None  # use only the first `num_heads` heads; None: all


class MedusaDrafter:
    Options: ClassVar[type[DraftOptions]] = MedusaOptions
    needs_topk = 0

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        assert isinstance(options, MedusaOptions)
        if path is None:
            raise DraftError("draft: 'medusa' needs a checkpoint; give its directory")
        try:
            shape = ModelShape.from_dir(target)
        except ModelError as error:
            raise DraftError(f"draft: {error}") from error
        self._file = read_medusa(path, shape)
        num_heads = self._file.num_heads if options.num_heads is None else options.num_heads
        if num_heads > self._file.num_heads:
            raise DraftError(
                f"draft.options.medusa.num_heads: {num_heads} is out of range; the checkpoint has "
                f"{self._file.num_heads} heads"
            )
        self._num_heads, self._branching = num_heads, options.branching
        self.aux_layers: tuple[int, ...] = (shape.num_layers,)
        # By sequence id: the position of a token, and its last hidden state [hidden_size], before
        # the target's final norm.
        self._last: dict[str, tuple[int, Tensor]] = {}

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        return None

    def bind(self, context: DraftContext) -> None:
        self._context = context
        sample = context.target.embed(torch.zeros(1, dtype=torch.int64, device=context.device))
        self.heads = MedusaHeads(self._file, self._num_heads, sample.dtype, context.device)

    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        ready = [
            seq
            for seq, budget in zip(seqs, budgets, strict=True)
            if budget > 1 and self._has_state(seq)
        ]
        depth = min(self._num_heads, max(budgets, default=1) - 1)
        found = dict(zip([seq.id for seq in ready], self._candidates(ready, depth), strict=True))
        return [
            product_tree(seq.tokens[-1], found.get(seq.id, ()), budget)
            for seq, budget in zip(seqs, budgets, strict=True)
        ]

    def observe(self, feedback: Feedback) -> None:
        """Store the hidden state of the last committed token of each sequence."""
        verified = [seq for seq in feedback.seqs if seq.id in feedback.results]
        committed = [feedback.committed(seq) for seq in verified]
        if not verified:
            return
        states = feedback.hidden_states(self.aux_layers, [each.rows[-1] for each in committed])
        if states is None:
            return  # the stored states are now out of date; `_has_state` compares their positions
        for seq, each, state in zip(verified, committed, states.unbind(), strict=True):
            self._last[seq.id] = each.start + len(each.rows) - 1, state

    def forget(self, seq_id: str) -> None:
        self._last.pop(seq_id, None)

    def _has_state(self, seq: SequenceView) -> bool:
        """Whether the hidden state of the token before the root is stored."""
        return seq.id in self._last and self._last[seq.id][0] == seq.num_tokens - 2

    def _candidates(self, seqs: Sequence[SequenceView], depth: int) -> list[list[Candidates]]:
        """The candidates of each of the `depth` positions after the root, per sequence."""
        if not seqs:
            return []
        context = self._context
        states = torch.stack([self._last[seq.id][1] for seq in seqs])
        logits = self.heads(context.target.final_norm(states), depth).flatten(0, 1)
        width = min(self._branching, logits.shape[1])
        if (ids := self._file.token_ids) is not None:
            whole = logits.new_full((len(logits), context.vocab_size), -torch.inf)
            whole[:, ids.to(context.device)] = logits
            logits = whole
        # Penalties count the emitted tokens only: the nodes of one depth have different paths.
        rows = [
            Row(context.sampling_state(seq), seq.num_tokens + after)
            for seq in seqs
            for after in range(depth)
        ]
        sampler = context.sampler
        best = sampler.perturb(sampler.process(logits, rows), rows).log_softmax(-1).topk(width)
        tokens, probs = best.indices.tolist(), best.values.exp().tolist()
        candidates: list[Candidates] = [
            list(zip(*row, strict=True)) for row in zip(tokens, probs, strict=True)
        ]
        return [candidates[start : start + depth] for start in range(0, len(candidates), depth)]


def product_tree(root: int, depths: Sequence[Candidates], budget: int) -> DraftTree:
    """The `budget` nodes of highest path probability, root included, of the tree in which every
    node of depth d has the children `depths[d]`."""
    tokens, parents, path_probs = [root], [-1], [1.0]
    # Frontier: the next unused child of each node, as (negative path probability, insertion number,
    # parent, depth, rank among the candidates); heapq pops the smallest.
    heap: list[tuple[float, int, int, int, int]] = []
    num_added = 0

    def add_child(parent: int, depth: int, rank: int) -> None:
        nonlocal num_added
        if depth < len(depths) and rank < len(depths[depth]):
            path_prob = path_probs[parent] * depths[depth][rank][1]
            if path_prob > 0.0:
                num_added += 1
                heapq.heappush(heap, (-path_prob, num_added, parent, depth, rank))

    add_child(0, 0, 0)
    while heap and len(tokens) < budget:
        negative, _, parent, depth, rank = heapq.heappop(heap)
        tokens.append(depths[depth][rank][0])
        parents.append(parent)
        path_probs.append(-negative)
        add_child(parent, depth, rank + 1)
        add_child(len(tokens) - 1, depth + 1, 0)
    return build_tree(tokens, parents, path_probs)
