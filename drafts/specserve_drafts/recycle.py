"""Token recycling: what the target held likely when these tokens last came along.

Every verification pass tells, for each of its rows, rejected nodes included, the target's own best
next tokens there. A table keeps them by the last tokens, and a tree is grown from it best-first
(after Luo et al. 2024, "Turning Trash into Treasure: Accelerating Inference of Large Language
Models with Token Recycling", arXiv 2408.08696, who keep them by the last token alone).

Beside the table of all requests each one has its own, which begins with its prompt and believes
more in what it heard last: a text repeats itself. What is in a prompt is nobody else's.

A request that is not drafted for teaches nothing, as that takes time which brings it none.

What requests of one `cache_salt` have taught is not found by another's; what was taught without a
salt, and so what a table was tuned on, is there for all. Host only.
"""

import hashlib
import logging
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch

from specserve.batch import ModelOutput
from specserve.cache.storage import KVSpec
from specserve.drafting.base import DraftContext, DraftError, DraftOptions, Feedback
from specserve.sequence import SequenceView
from specserve.tree import DraftTree
from specserve_drafts.fit import Target, check_fit, shipped
from specserve_drafts.successors import NO_SALT, ORDERS, OWN, TABLE, WIDTH, SuccessorTable
from specserve_kernels.dispatch import native_host

_OWN_CONTEXTS: Final = 2**14  # of a request; 230 kB, which stay in the cache
_SAVE_INTERVAL: Final = 60.0  # seconds

logger = logging.getLogger(__name__)

_Best = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


@dataclass(slots=True)
class _Own:
    """A request's own table, and how many of its tokens that has heard."""

    table: SuccessorTable
    num_known: int = 0


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
        self._own: dict[str, _Own] = {}  # by sequence id
        self._asked: set[str] = set()  # sequences, in this step
        self._saved_at = time.monotonic()

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
        self._host = native_host() if context.device.type == "cpu" else None

    def propose(self, seqs: Seq[SequenceView], budgets: Seq[int]) -> list[DraftTree]:
        """Best-first by path score.

        The target's noise is left out at temperature > 0: what was likely in another text is too
        far from the distribution here to gain by it (drafts/LOG.md).
        """
        source = self._context.source
        trees = [
            self.table.grow(
                _salts(seq.cache_salt),
                seq.tokens[: -ORDERS - 1 : -1],
                budget,
                self._min_probability,
                source,
                self._own_table(seq),
            )
            for seq, budget in zip(seqs, budgets, strict=True)
        ]
        self._asked.update(seq.id for seq in seqs)
        return trees

    def observe(self, feedback: Feedback) -> None:
        if not self._asked:
            return
        best, logits = self._best(feedback.output)
        first = 0
        for entry in feedback.entries:
            seq, verdict = entry.seq, feedback.verdicts.get(entry.seq.id)
            if verdict is None:
                continue
            tree = feedback.trees[seq.id]
            rows = slice(first, first + len(tree))
            first = rows.stop
            if seq.id not in self._asked:
                continue
            salt = _salts(seq.cache_salt)[0]
            before = seq.tokens[-2 : -ORDERS - 1 : -1]
            self.table.learn(salt, before, tree, best[rows], logits[rows])
            own = self._own[seq.id]
            own.table.learn(NO_SALT, before, tree, best[rows], logits[rows])
            own.num_known = seq.num_tokens + len(verdict.emitted)
        self._asked.clear()
        if self._file is not None and time.monotonic() - self._saved_at >= _SAVE_INTERVAL:
            self._saved_at = time.monotonic()
            self._save(self._file)

    def forget(self, seq_id: str) -> None:
        """What a request taught is there for the next one, but for its own table."""
        self._own.pop(seq_id, None)

    def _save(self, file: Path) -> None:
        """Whatever becomes of the file, the table goes on."""
        try:
            self.table.save(file)
        except ValueError as error:
            logger.warning("draft.options.recycle.file: %s", error)

    def _own_table(self, seq: SequenceView) -> SuccessorTable:
        own = self._own.get(seq.id)
        if own is None:
            table = SuccessorTable(_OWN_CONTEXTS, self.target.vocab_size, OWN)
            own = self._own[seq.id] = _Own(table)
        if own.num_known < seq.num_tokens:  # the prompt, or what came while nobody asked
            own.table.learn_text(seq.tokens[max(own.num_known - ORDERS, 0) :])
            own.num_known = seq.num_tokens
        return own.table

    def _best(self, output: ModelOutput) -> _Best:
        """[rows, WIDTH] the best next tokens and their logits."""
        top = output.topk
        if top is None:
            top = output.logits.topk(WIDTH).indices
        if self._host is not None:
            picked: _Best = self._host.best_logits(top.numpy(), output.logits.numpy(), WIDTH)
            return picked
        top = top[:, :WIDTH]
        logits = output.logits.gather(1, top.clamp(min=0))
        return top.cpu().numpy(), logits.cpu().numpy()


@lru_cache(maxsize=1024)
def _salts(cache_salt: str) -> tuple[int, ...]:
    """Where a request looks; the first is where it writes."""
    if not cache_salt:
        return (NO_SALT,)
    digest = hashlib.blake2b(cache_salt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little"), NO_SALT
