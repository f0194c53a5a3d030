"""Writes K and V to the cache and compacts accepted paths. Knows slots, not blocks or sequences."""

from torch import Tensor


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """In place: write row i of k and v to slots[i] of the caches; see `Kernels.kv_write`."""
    written = slots >= 0
    if not bool(written.all()):
        k, v, slots = k[written], v[written], slots[written]
    k_cache.index_copy_(0, slots, k.to(k_cache.dtype))
    v_cache.index_copy_(0, slots, v.to(v_cache.dtype))


def kv_commit(kv: Tensor, src: Tensor, dst: Tensor) -> None:
    """In place: move slots src[i] -> dst[i] in every layer; see `Kernels.kv_commit`.

    Reading every source before the first write is equivalent to ascending order, because no
    destination is the source of a later move.
    """
    kv.index_copy_(2, dst, kv.index_select(2, src))
