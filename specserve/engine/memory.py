"""Sizes the KV pool: from the budget in the settings, or from the memory that is free."""

from typing import Final

import torch

from specserve.config import CacheConfig, ConfigError, parse_bytes
from specserve.models.memory import free_memory

CPU_SHARE: Final = 0.25  # fraction of the memory that is free when the pool is sized
CUDA_SHARE: Final = 0.85  # the same on a GPU


def count_blocks(
    config: CacheConfig,
    bytes_per_slot: int,
    max_model_len: int,
    max_num_seqs: int,
    device: torch.device,
) -> int:
    """The number of blocks of the KV pool. `bytes_per_slot` covers the target and every draft.

    Without `kv_memory` the budget is a fraction of the free memory, at most what `max_num_seqs`
    sequences of `max_model_len` tokens need. Raises ConfigError if not even one block fits.
    """
    bytes_per_block = bytes_per_slot * config.block_size
    if config.kv_memory is not None:
        budget = parse_bytes("kv_memory", config.kv_memory)
    else:
        share = CUDA_SHARE if device.type == "cuda" else CPU_SHARE
        wanted = max_num_seqs * -(-max_model_len // config.block_size) * bytes_per_block
        budget = min(int(free_memory(device) * share), wanted)
    if budget < bytes_per_block:
        raise ConfigError(
            f"kv_memory: {budget} bytes hold no block of {bytes_per_block} bytes; "
            f"give at least {-(-bytes_per_block // 2**20)}MiB"
        )
    return budget // bytes_per_block
