"""Token recycling: what the target held likely when these tokens last came along.

Every verification pass tells, for each of its rows, rejected nodes included, the target's own best
next tokens there. A table keeps them by the last tokens, and a tree is grown from it best-first
(after Luo et al. 2024, "Turning Trash into Treasure: Accelerating Inference of Large Language
Models with Token Recycling", arXiv 2408.08696, who keep them by the last token alone).

What requests of one `cache_salt` have taught is not found by another's; what was taught without a
salt, and so what a table was tuned on, is there for all. Host only.
"""

import hashlib
import heapq
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specserve.cache.storage import KVSpec
from specserve.drafting.base import DraftContext, DraftError, DraftOptions, Feedback
from specserve.sequence import Sequence
from specserve.step import Entry
from specserve.tree import DraftTree, build_tree
from specserve_drafts.fit import Target, check_fit, shipped
from specserve_drafts.successors import ORDERS, TABLE, WIDTH, SuccessorTable

_PUBLIC: Final = 0
_SAVE_INTERVAL: Final = 60.0  # seconds
_ROWS_TOGETHER: Final = 48  # of passes, before they are written

Context = tuple[int, ...]  # the last token first


class RecycleOptions(DraftOptions, frozen=True, forbid_unknown_fields=True):
    contexts: int = 2**19  # that a new table has room for; a power of two
    shipped: bool = True  # begin with the table that ships for the target, if there is one
    min_probability: float = 0.02  # paths less likely than this are not proposed
    file: str | None = None  # a table kept between runs: read at start-up, written once a minute


class RecycleDrafter:
    Options: ClassVar[type[DraftOptions]] = RecycleOptions
    needs_taps: tuple[int, ...] = ()
    needs_topk = WIDTH

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        assert isinstance(options, RecycleOptions)
        if not (8 <= options.contexts <= 2**26 and options.contexts.bit_count() == 1):
            raise DraftError(
                f"draft.options.recycle.contexts: {options.contexts}; "
                f"expected a power of two from 8 to {2**26}"
            )
        if not 0.0 <= options.min_probability <= 1.0:
            raise DraftError(
                f"draft.options.recycle.min_probability: {options.min_probability}; use 0 to 1"
            )
        self._min_probability = options.min_probability
        self._file = None if options.file is None else Path(options.file)
        self.target = Target.of(target)
        if path is not None:
            check_fit(path, self.target)
        elif options.shipped:
            path = shipped("recycle", self.target)
        self.table = self._first_table(path, options.contexts)
        self._saved_at = time.monotonic()
        self._seen: list[_Seen] = []  # not written yet
        self._num_seen = 0

    def _first_table(self, path: Path | None, contexts: int) -> SuccessorTable:
        """What the file holds, else what the draft's directory holds, else nothing."""
        vocab_size, field = self.target.vocab_size, "draft"
        try:
            if self._file is not None:
                field = "draft.options.recycle.file"
                if not self._file.parent.is_dir():
                    raise ValueError(f"{self._file.parent} is no directory; make it first")
                if self._file.exists():
                    return SuccessorTable.load(self._file, vocab_size)
            if path is not None:
                return SuccessorTable.load(path / TABLE, vocab_size)
        except ValueError as error:
            raise DraftError(f"{field}: {error}") from error
        return SuccessorTable(contexts, vocab_size)

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        return None

    def bind(self, context: DraftContext) -> None:
        self._context = context

    def propose(self, seqs: Seq[Sequence], budgets: Seq[int]) -> list[DraftTree]:
        return [self._grow(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]

    def observe(self, feedback: Feedback) -> None:
        entries = [entry for entry in feedback.entries if entry.seq.id in feedback.verdicts]
        if not entries:
            return
        self._seen.append(_Seen.of(entries, feedback))
        self._num_seen += len(self._seen[-1].logits)
        if self._num_seen >= _ROWS_TOGETHER:
            self._learn()

    def _learn(self) -> None:
        """Write what was seen. Many rows cost hardly more than some, so it is put off a little."""
        best = [_best(seen) for seen in self._seen]
        tokens = np.concatenate([tokens for tokens, _ in best])
        shares = np.exp(np.concatenate([logits for _, logits in best]))
        salts = np.array([salt for seen in self._seen for salt in seen.salts()], np.uint64)
        contexts = np.array([context for seen in self._seen for context in seen.contexts()])
        # Logits that are no numbers end their request; they are nothing to learn from.
        sound = np.isfinite(shares).all(1) & (tokens >= 0).all(1)
        self.table.write(
            salts[sound],
            contexts[sound],
            tokens[sound],
            shares[sound] / shares[sound].sum(1, keepdims=True),
        )
        self._seen, self._num_seen = [], 0
        self._save_now_and_then()

    def forget(self, seq_id: str) -> None:
        """Nothing is kept for a request, but what it taught is there for the next one."""
        if self._seen:
            self._learn()

    def _save_now_and_then(self) -> None:
        if self._file is not None and time.monotonic() - self._saved_at >= _SAVE_INTERVAL:
            self.table.save(self._file)
            self._saved_at = time.monotonic()

    def _grow(self, seq: Sequence, budget: int) -> DraftTree:
        """Best-first by path score.

        The target's noise is left out at temperature > 0: what was likely in another text is too
        far from the distribution here to gain by it (drafts/LOG.md).
        """
        salt = _salt(seq.request.cache_salt)
        salts = (salt, _PUBLIC) if salt != _PUBLIC else (_PUBLIC,)
        tokens, parents, scores = [seq.tokens[-1]], [-1], [1.0]
        # Open nodes: score (negative: a heap pops the least), age, parent, token, its context.
        heap: list[tuple[float, int, int, int, Context]] = []
        num_seen, floor = 0, self._min_probability
        context: Context = tuple(seq.tokens[: -ORDERS - 1 : -1])
        while len(tokens) < budget:
            node = len(tokens) - 1
            for token, share in self.table.candidates(salts, context):
                score = scores[node] * share
                if score < floor:
                    break
                num_seen += 1
                successor = (token, *context[: ORDERS - 1])
                heapq.heappush(heap, (-score, num_seen, node, token, successor))
            if not heap:
                break
            negative, _, parent, token, context = heapq.heappop(heap)
            tokens.append(token)
            parents.append(parent)
            scores.append(-negative)
        return build_tree(tokens, parents, scores, self._context.source)


@lru_cache(maxsize=1024)
def _salt(seq_salt: str) -> int:
    if not seq_salt:
        return _PUBLIC
    return int.from_bytes(hashlib.blake2b(seq_salt.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class _Seen:
    """One pass, as it is kept until it is written."""

    trees: list[DraftTree]
    before: list[list[int]]  # per tree, the tokens before its root
    tree_salts: list[int]
    logits: Tensor  # [rows, vocab_size], a row per node
    top: Tensor | None

    @classmethod
    def of(cls, entries: Seq[Entry], feedback: Feedback) -> "_Seen":
        return cls(
            [feedback.trees[entry.seq.id] for entry in entries],
            [entry.seq.tokens[-ORDERS:-1] for entry in entries],
            [_salt(entry.seq.request.cache_salt) for entry in entries],
            feedback.output.logits,
            feedback.output.topk,
        )

    def salts(self) -> Iterator[int]:
        """Of every row."""
        for salt, tree in zip(self.tree_salts, self.trees, strict=True):
            yield from [salt] * len(tree)

    def contexts(self) -> Iterator[Context]:
        """Of every row: the last tokens of its path, its own included; -1 before the text."""
        for tree, before in zip(self.trees, self.before, strict=True):
            above = (*before[::-1], *[-1] * (ORDERS - 1 - len(before)))
            contexts: list[Context] = []
            for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
                context = above if parent < 0 else contexts[parent][: ORDERS - 1]
                contexts.append((token, *context))
            yield from contexts


def _best(seen: _Seen) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """[rows, WIDTH] the best next tokens, and how far their logits are below the best one's."""
    top = seen.top
    if top is None or top.shape[1] < WIDTH:
        top = seen.logits.topk(WIDTH).indices
    top = top[:, :WIDTH]
    logits = seen.logits.gather(1, top.clamp(min=0)).float()
    return top.cpu().numpy(), (logits - logits[:, :1]).cpu().numpy()
