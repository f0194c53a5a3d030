"""Read-only views of mutable objects: reads go to the original, writes raise."""

from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import TypeVar, overload

import msgspec

from specserve.types import SamplingParams

T = TypeVar("T")


class ReadOnlyList(Sequence[T]):
    """A live, read-only view of a list; slices are copies."""

    __slots__ = ("_items",)

    def __init__(self, items: list[T]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        return self._items[index]

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)


def read_only_params(params: SamplingParams) -> SamplingParams:
    """A copy of `params` whose only mutable field, the `logit_bias` dict, is read-only."""
    bias = MappingProxyType(params.logit_bias)
    return msgspec.structs.replace(params, logit_bias=bias)
