"""The top-k table of `recycle`: its memory, its files, and its measured constants."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from specserve.tree import DraftTree
from specserve_drafts.atomic_write import atomic_write
from specserve_kernels.host import HOST, HostCode
from specserve_kernels.host.interface import row_dtype

TABLE_FILE: Final = "table.safetensors"  # file name in a draft's directory
_FIELDS: Final = ("tags", "tokens", "prob_steps")  # of a row
# Probabilities are stored as one byte s, which stands for 2 ** (-s / _PER_OCTAVE).
_PER_OCTAVE: Final = 16
_PROBS: Final[list[float]] = (2.0 ** (-np.arange(256) / _PER_OCTAVE)).astype(np.float32).tolist()


class UpdateRule(NamedTuple):
    """For contexts of 1, 2, ... tokens; measured in drafts/LOG.md.

    learning_rate: the weight of a new observation in the running mean; higher for long contexts,
    which recur rarely and whose latest continuation predicts best. weight: that of a context's row
    against those of the shorter contexts when candidates are read.
    """

    learning_rate: tuple[float, ...]
    weight: tuple[float, ...]


SHARED_RULE: Final = UpdateRule(learning_rate=(0.1, 0.2, 0.4), weight=(1.0, 0.5, 0.6))
# For the table of one request.
REQUEST_RULE: Final = UpdateRule(learning_rate=(0.5, 0.6, 0.8), weight=(0.6, 0.6, 0.7))


class TopKTable:
    """A table of `num_rows` rows, a power of two, for token ids below `vocab_size`."""

    def __init__(
        self,
        num_rows: int,
        vocab_size: int,
        rule: UpdateRule = SHARED_RULE,
        host: HostCode = HOST,
    ) -> None:
        assert num_rows.bit_count() == 1, f"{num_rows} is no power of two"
        token_bytes = 2 if vocab_size <= 2**16 else 4
        self._rows = np.zeros(num_rows, row_dtype(token_bytes))
        self._table = host.TopKTable(
            self._rows.view(np.uint8),
            token_bytes=token_bytes,
            probs=_PROBS,
            steps_per_octave=_PER_OCTAVE,
            learning_rate=rule.learning_rate,
            weight=rule.weight,
        )
        # See `reference.TopKTable` of the host code.
        self.learn = self._table.learn
        self.learn_text = self._table.learn_text

    @property
    def num_filled(self) -> int:
        """Rows that were written."""
        return int(np.count_nonzero(self._rows["tags"]))

    def grow(
        self,
        salts: Sequence[int],
        context: Sequence[int],
        max_nodes: int,
        min_probability: float,
        request_table: "TopKTable | None" = None,
    ) -> DraftTree:
        """See `reference.TopKTable.grow` of the host code."""
        own = None if request_table is None else request_table._table
        return DraftTree(*self._table.grow(salts, context, max_nodes, min_probability, own))

    def save(self, path: Path) -> None:
        """Write the table as safetensors, atomically. Raises ValueError, naming the file."""
        columns = {name: self._rows[name].copy() for name in _FIELDS}
        with atomic_write(path) as part:
            save_file(columns, part)

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> "TopKTable":
        """Read a table. Raises ValueError, naming the file, if it is not a table for a vocabulary
        of this size."""
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        num_rows = len(arrays.get("tags", ()))
        if num_rows.bit_count() != 1:
            raise ValueError(f"{path} is no top-k table: it has {num_rows} rows")
        table = cls(num_rows, vocab_size)
        for name in _FIELDS:
            own, read = table._rows[name], arrays.get(name)
            if read is None or (read.shape, read.dtype) != (own.shape, own.dtype):
                raise ValueError(
                    f"{path}: {name} is {'missing' if read is None else (read.shape, read.dtype)}, "
                    f"expected {(own.shape, own.dtype)}; make the table anew for this target"
                )
            own[:] = read
        if table._rows["tokens"].max(initial=0) >= vocab_size:
            raise ValueError(f"{path} has tokens outside the vocabulary of {vocab_size}")
        return table
