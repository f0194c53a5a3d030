"""How many KV blocks fit: the budget the user gave, or what the machine can spare."""

import os
from typing import Final

import torch

from specserve.config import CacheConfig, ConfigError, parse_bytes

CPU_SHARE: Final = 0.25  # of the memory that is free now
CUDA_SHARE: Final = 0.85  # of what is free once the weights are loaded
_GIB: Final = 2**30


def free_memory(device: torch.device) -> int:
    """Bytes free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def count_blocks(
    config: CacheConfig,
    bytes_per_slot: int,
    max_model_len: int,
    max_num_seqs: int,
    device: torch.device,
) -> int:
    """Blocks of the KV pool. `bytes_per_slot` covers the target and every draft.

    Measured budgets stop at what `max_num_seqs` full contexts can use. Raises ConfigError if not
    even one block fits.
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
