"""The prefix cache: maps hashes of token prefixes to the KV blocks that hold them.

The hash of a block covers its tokens and, through the hash of the block before it, all earlier
tokens and the salt, so equal hashes mean equal KV. Knows block ids, no refcounts and no tensors.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a full block; `parent` is the hash of the block before it.

    A collision would let one tenant use the KV of another, so the hash is cryptographic.
    """
    content = np.array(tokens, np.int64).tobytes()
    return hashlib.blake2b(content, key=parent, digest_size=16).digest()


def root_hash(salt: str) -> bytes:
    """The parent hash of the first block. Sequences with different salts never share a block."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


def prefix_hashes(tokens: Sequence[int], block_size: int, salt: str) -> list[bytes]:
    """Hashes of the full blocks of `tokens` that may come from the cache.

    The block that holds the last token is left out: that token is always computed, because its
    logits are needed.
    """
    hashes: list[bytes] = []
    parent = root_hash(salt)
    for start in range(0, len(tokens) - block_size, block_size):
        parent = chain_hash(parent, tokens[start : start + block_size])
        hashes.append(parent)
    return hashes


class PrefixCache:
    """A one-to-one map between block hashes and the ids of the blocks that hold them."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._hash_of

    def __len__(self) -> int:
        return len(self._block_of)

    def lookup(self, block_hash: bytes) -> int | None:
        return self._block_of.get(block_hash)

    def insert(self, block_hash: bytes, block_id: int) -> None:
        """Add a full committed block, unless another block with this hash is already cached."""
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def evict(self, block_id: int) -> None:
        del self._block_of[self._hash_of.pop(block_id)]

    def check_integrity(self) -> None:
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, "hash maps disagree"
