"""A drafter that is watched: its trees, the times of its calls, and what is wrong with them."""

import gc
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from traceback import extract_tb
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import numpy as np

from specserve.sequence import SequenceState, SequenceView
from specserve.speculation.compose import checked_tree
from specserve.speculation.drafter import Drafter, Feedback, NoModelDrafter
from specserve.tree import MAX_NODES, DraftTree

_DRAFTER_IDS: Final = np.array([0] + [1] * (MAX_NODES - 1), np.uint8)
_NOT_SEARCHED: Final = (
    *(type, ModuleType, FunctionType, BuiltinFunctionType, MethodType),
    partial,
)


class WatchedDrafter(NoModelDrafter):
    """Passes calls on to `drafter`. Every error is noted in `errors` and raised again."""

    def __init__(self, drafter: Drafter, vocab_size: int) -> None:
        self.drafter = drafter
        self.aux_layers, self.needs_topk = drafter.aux_layers, drafter.needs_topk
        self.hides_private = False  # whether views of sequences have no private attributes
        self.repeats = False  # whether every second call for several sequences fails afterwards
        self.errors: list[str] = []
        self.trees: dict[tuple[str, int], DraftTree] = {}  # by sequence id and number of tokens
        # (method, number of sequences) -> seconds of each call
        self.seconds: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
        self._vocab_size = vocab_size

    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        trees: list[DraftTree] = self._call("propose", len(seqs), self._views(seqs), budgets)
        with self._noting("propose: "):
            if len(trees) != len(seqs):
                raise ValueError(f"{len(trees)} trees for {len(seqs)} sequences")
            for seq, budget, tree in zip(seqs, budgets, trees, strict=True):
                self.trees[seq.id, seq.num_tokens] = checked_tree(
                    tree, seq, budget, self._vocab_size, _DRAFTER_IDS
                )
        self._repeat("propose", len(seqs))
        return trees

    def observe(self, feedback: Feedback) -> None:
        watched = replace(feedback, seqs=tuple(self._views(feedback.seqs)))
        self._call("observe", len(feedback.seqs), watched)
        self._repeat("observe", len(feedback.seqs))

    def forget(self, seq_id: str) -> None:
        self._call("forget", 1, seq_id)

    def kept_of(self, seq_ids: Collection[str]) -> str | None:
        """Which attribute of the drafter leads to one of these ids or to a view of a sequence."""
        attributes = {**vars(type(self.drafter)), **getattr(self.drafter, "__dict__", {})}
        for name, value in attributes.items():
            for each in _reachable(value):
                if isinstance(each, str) and each in seq_ids:
                    return f"{name} has the id {each!r}"
                if isinstance(each, SequenceView | SequenceState | Feedback):
                    return f"{name} has a {type(each).__name__}"
        return None

    def _call(self, method: str, num_seqs: int, *arguments: Any) -> Any:
        with self._noting(f"{method} raised "):
            started = time.perf_counter()
            result = getattr(self.drafter, method)(*arguments)
            if method == "propose":
                result = list(result)
            self.seconds[method, num_seqs].append(time.perf_counter() - started)
        return result

    def _views(self, seqs: Sequence[SequenceView]) -> Sequence[SequenceView]:
        return [_PublicView(seq) for seq in seqs] if self.hides_private else seqs

    def _repeat(self, method: str, num_seqs: int) -> None:
        """The engine makes a call that fails again, for each of its sequences alone."""
        if self.repeats and num_seqs > 1 and len(self.seconds[method, num_seqs]) % 2:
            raise RuntimeError("this call succeeded, and fails for a test")

    @contextmanager
    def _noting(self, call: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.errors.append(f"{call}{type(error).__name__}: {error}{self._place(error)}")
            raise

    def _place(self, error: BaseException) -> str:
        """The last line in the drafter's own file that `error` passed through, if any."""
        file = getattr(sys.modules.get(type(self.drafter).__module__), "__file__", None)
        lines = [f.lineno for f in extract_tb(error.__traceback__) if f.filename == file]
        return f" ({Path(file).name}:{lines[-1]})" if file and lines else ""


class _PublicView(SequenceView):
    """A view of a sequence without private attributes."""

    def __init__(self, view: SequenceView) -> None:
        object.__setattr__(self, "_seq", view)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") and not name.startswith("__"):
            raise AttributeError(f"{name} of a SequenceView is private")
        return getattr(object.__getattribute__(self, "_seq"), name)


def _reachable(value: Any) -> Iterator[Any]:
    """`value` and all objects that it leads to, except through functions, classes and modules."""
    seen: set[int] = set()
    found = [value]
    while found:
        each = found.pop()
        if id(each) in seen or isinstance(each, _NOT_SEARCHED):
            continue
        seen.add(id(each))
        yield each
        found += gc.get_referents(each)
