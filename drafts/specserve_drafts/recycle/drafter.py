"""The `recycle` drafter: token recycling from the target's own top-k tokens.

Every verification pass yields the target's most likely next tokens at each tree node, rejected
nodes included. A top-k table (`topk_table`) stores them by the last one to three tokens, and a tree
is grown from the table best-first (after Luo et al. 2024, arXiv 2408.08696, whose table is keyed by
the last token alone).

One table is shared by all requests. Each request also has a table of its own, which begins with its
prompt and has a higher learning rate, as texts repeat themselves.

Entries learned under one `cache_salt` are not read under another. Entries learned without a salt,
including those of a tuned table, are read by all requests. Requests for which this drafter was not
called are not learned from, as learning takes time and would not speed them up.
"""

import hashlib
import logging
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar, Final

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from specserve.batch import ModelOutput
from specserve.sequence import SequenceView
from specserve.speculation.drafter import (
    DraftError,
    DraftOptions,
    Feedback,
    NoModelDrafter,
    Probability,
)
from specserve.tree import DraftTree
from specserve_drafts.compatibility import Target, check_compatible, pretrained_draft
from specserve_drafts.recycle.topk_table import REQUEST_RULE, TABLE_FILE, TopKTable
from specserve_kernels.host import HOST
from specserve_kernels.host.interface import NO_SALT, ORDERS, WIDTH

# Rows of a request's own table: 230 kB with 16-bit token ids, which stays in the CPU cache.
_REQUEST_CONTEXTS: Final = 2**14
_SAVE_INTERVAL: Final = 60.0  # seconds

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _RequestTable:
    """A request's own table, and how many of the sequence's tokens it has learned."""

    table: TopKTable
    num_learned: int = 0


class RecycleOptions(DraftOptions, frozen=True, forbid_unknown_fields=True):
    contexts: Annotated[int, Meta(ge=8, le=2**26)] = 2**19  # rows of a new table; a power of two
    pretrained: bool = True  # start with the pretrained table for the target, if there is one
    min_probability: Probability = 0.02  # nodes of a lower path probability are not proposed
    # File that keeps the table between runs: read at start-up, written at most once a minute.
    file: str | None = None

    def __post_init__(self) -> None:
        if self.contexts.bit_count() != 1:
            raise ValueError(f"contexts: {self.contexts}; expected a power of two")


class RecycleDrafter(NoModelDrafter):
    Options: ClassVar[type[DraftOptions]] = RecycleOptions
    needs_topk = WIDTH

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        assert isinstance(options, RecycleOptions)
        self._min_probability = options.min_probability
        self._file = None if options.file is None else Path(options.file)
        self.target = Target.of(target)
        if path is not None:
            check_compatible(path, self.target)
        elif options.pretrained:
            path = pretrained_draft("recycle", self.target)
        self.table = self._first_table(path, options.contexts)
        self._request_tables: dict[str, _RequestTable] = {}  # by sequence id
        self._proposed_for: set[str] = set()  # ids of the sequences proposed for in this step
        self._saved_at = time.monotonic()

    def _first_table(self, path: Path | None, contexts: int) -> TopKTable:
        """The table in `options.file` if that exists, else the one in the draft's directory `path`,
        else an empty one. Raises DraftError."""
        vocab_size, field = self.target.vocab_size, "draft"
        try:
            if self._file is not None:
                field = "draft.options.recycle.file"
                if not self._file.parent.is_dir():
                    raise ValueError(f"{self._file.parent} is no directory; make it first")
                if self._file.exists():
                    return TopKTable.load(self._file, vocab_size)
            if path is not None:
                return TopKTable.load(path / TABLE_FILE, vocab_size)
        except ValueError as error:
            raise DraftError(f"{field}: {error}") from error
        return TopKTable(contexts, vocab_size)

    def propose_tree(self, seq: SequenceView, budget: int) -> DraftTree:
        """Grow a tree best-first by path probability.

        At temperature > 0 candidates are ranked without the target's noise: probabilities that were
        recorded in other texts are too far from the current distribution to gain from it
        (drafts/LOG.md, 2026-11-25).
        """
        recent, own = seq.tokens[: -ORDERS - 1 : -1], self._request_table(seq)
        salts = _salts(seq.cache_salt)
        tree = self.table.grow(salts, recent, budget, self._min_probability, own)
        self._proposed_for.add(seq.id)
        return tree

    def observe(self, feedback: Feedback) -> None:
        if not self._proposed_for:
            return
        tokens, logits = self._top_successors(feedback.output)
        for seq in feedback.seqs:
            result = feedback.results.get(seq.id)
            if result is None or seq.id not in self._proposed_for:
                continue
            tree, rows = feedback.trees[seq.id], feedback.node_rows(seq)
            salt = _salts(seq.cache_salt)[0]
            before = seq.tokens[-2 : -ORDERS - 1 : -1]
            self.table.learn(salt, before, tree, tokens[rows], logits[rows])
            own = self._request_tables[seq.id]
            own.table.learn(NO_SALT, before, tree, tokens[rows], logits[rows])
            own.num_learned = seq.num_tokens + len(result.emitted)
        self._proposed_for.clear()
        if self._file is not None and time.monotonic() - self._saved_at >= _SAVE_INTERVAL:
            self._saved_at = time.monotonic()
            try:
                self.table.save(self._file)
            except ValueError as error:  # drafting continues
                logger.warning("draft.options.recycle.file: %s", error)

    def forget(self, seq_id: str) -> None:
        """Drop the request's own table; the shared table keeps what was learned."""
        self._request_tables.pop(seq_id, None)

    def _request_table(self, seq: SequenceView) -> TopKTable:
        own = self._request_tables.get(seq.id)
        if own is None:
            table = TopKTable(_REQUEST_CONTEXTS, self.target.vocab_size, REQUEST_RULE)
            own = self._request_tables[seq.id] = _RequestTable(table)
        # The prompt, or tokens that were emitted while this drafter was not called.
        if own.num_learned < seq.num_tokens:
            own.table.learn_text(seq.tokens[max(own.num_learned - ORDERS, 0) :])
            own.num_learned = seq.num_tokens
        return own.table

    def _top_successors(
        self, output: ModelOutput
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The WIDTH most likely next tokens of each logit row and their logits, [rows, WIDTH]."""
        top = output.topk
        if top is None:
            top = output.logits.topk(WIDTH).indices
        if top.device.type == "cpu":
            return HOST.best_logits(top.numpy(), output.logits.numpy(), WIDTH)
        top = top[:, :WIDTH]
        logits = output.logits.gather(1, top.clamp(min=0))
        return top.cpu().numpy(), logits.cpu().numpy()


@lru_cache(maxsize=1024)
def _salts(cache_salt: str) -> tuple[int, ...]:
    """The table salts that a request reads, in order; it writes under the first."""
    if not cache_salt:
        return (NO_SALT,)
    digest = hashlib.blake2b(cache_salt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little"), NO_SALT
