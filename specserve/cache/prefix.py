"""Which block holds which prefix: a chain of hashes over committed blocks.

A block's hash covers its own tokens and, through its parent's hash, everything before them and the
salt; so equal hashes mean equal KV. Knows block ids, not refcounts or tensors.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a full block given the hash before it.

    A collision would serve one tenant another's KV, so this is a cryptographic hash.
    """
    content = np.array(tokens, np.int64).tobytes()
    return hashlib.blake2b(content, key=parent, digest_size=16).digest()


def root_hash(salt: str) -> bytes:
    """The hash before the first block; a different salt never shares a block."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


def prefix_hashes(tokens: Sequence[int], block_size: int, salt: str) -> list[bytes]:
    """Hashes of the full blocks of a prompt that may be shared.

    The block of the last token is left out: that token has to be computed in any case, its logits
    are what the request is for.
    """
    hashes: list[bytes] = []
    parent = root_hash(salt)
    for start in range(0, len(tokens) - block_size, block_size):
        parent = chain_hash(parent, tokens[start : start + block_size])
        hashes.append(parent)
    return hashes


class PrefixCache:
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
        """Remember a full committed block, unless its content is already held by another."""
        if block_hash not in self._block_of:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def evict(self, block_id: int) -> None:
        del self._block_of[self._hash_of.pop(block_id)]

    def check_integrity(self) -> None:
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, "hash maps disagree"
