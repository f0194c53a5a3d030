"""The `ngram` drafter: prompt lookup (Saxena 2023, "Prompt Lookup Decoding").

It proposes the tokens that followed the latest earlier occurrence of the last few tokens, searching
the request's own prompt and output; the longest match wins. All work is on the host and takes
microseconds per proposal.
"""

from pathlib import Path
from typing import Annotated, ClassVar

from msgspec import Meta

from specserve.sequence import SequenceView
from specserve.speculation.drafter import DraftOptions, NoModelDrafter
from specserve.speculation.lookup import TextIndex, copied_text
from specserve.tree import DraftTree, root_tree

MatchSize = Annotated[int, Meta(ge=1, le=16)]


class NgramOptions(DraftOptions, frozen=True, forbid_unknown_fields=True):
    min_match: MatchSize = 1  # tokens that must match before anything is proposed
    max_match: MatchSize = 4  # the longest match looked up, in tokens

    def __post_init__(self) -> None:
        if self.min_match > self.max_match:
            raise ValueError(
                f"min_match: {self.min_match}; expected 1 to max_match ({self.max_match})"
            )


class NgramDrafter(NoModelDrafter):
    Options: ClassVar[type[DraftOptions]] = NgramOptions

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        assert isinstance(options, NgramOptions)
        self._options = options
        self._indexes: dict[str, TextIndex] = {}  # by sequence id

    def forget(self, seq_id: str) -> None:
        self._indexes.pop(seq_id, None)

    def propose_tree(self, seq: SequenceView, budget: int) -> DraftTree:
        index = self._indexes.get(seq.id)
        if index is None:
            index = TextIndex(self._options.min_match, self._options.max_match)
            self._indexes[seq.id] = index
        index.extend(seq.tokens)
        found = index.find(seq.tokens[-self._options.max_match :])
        if found is None:
            return root_tree(seq.tokens[-1])
        match, position = found
        return copied_text(seq.tokens[-1], seq.tokens, position, match, budget)
