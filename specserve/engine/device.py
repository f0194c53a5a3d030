"""Chooses device, dtype, kernels and exactness. `specserve doctor` prints the reasons."""

import torch
from msgspec import Struct

from specserve.config import ConfigError, TargetConfig
from specserve_kernels.dispatch import select_kernels
from specserve_kernels.ops import Kernels


class Platform(Struct, frozen=True):
    """The device, dtypes and kernels that the settings select on this machine."""

    device: torch.device
    dtype: torch.dtype
    packed_kv_dtype: torch.dtype  # of K and V, for models with packed weights
    kernels: Kernels
    exact: bool  # a row's result does not depend on the other rows of its forward pass
    reasons: dict[str, str]  # for the choice of device, dtype, kernels and exactness


def choose_platform(config: TargetConfig) -> Platform:
    """Raises ConfigError if this machine cannot provide what a setting requires."""
    reasons: dict[str, str] = {}
    device = _device(config, reasons)
    dtype = kv_dtype = _dtype(config, device, reasons)
    if config.dtype == "auto" and device.type == "cpu":
        # Half the bytes of float32. The kernels of models with packed weights only load K and V,
        # which needs no bfloat16 instructions.
        kv_dtype = torch.bfloat16
    kernels = select_kernels(device)
    reasons["kernels"] = f"{kernels.name}, the backend for {device.type}"
    exact = _exactness(config, device, kernels, reasons)
    return Platform(device, dtype, kv_dtype, kernels, exact, reasons)


def _device(config: TargetConfig, reasons: dict[str, str]) -> torch.device:
    if config.device == "auto":
        cuda = torch.cuda.is_available()
        reasons["device"] = "a CUDA device is there" if cuda else "torch finds no CUDA device"
        return torch.device("cuda" if cuda else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(
            f"device: {config.device!r} is not a device; use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {config.device!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(
            f"device: {config.device!r} is not there: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices; use cpu, or install a CUDA build of torch"
        )
    reasons["device"] = "as set"
    return device


def _dtype(config: TargetConfig, device: torch.device, reasons: dict[str, str]) -> torch.dtype:
    if config.dtype != "auto":
        reasons["dtype"] = "as set"
        dtype = getattr(torch, config.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported()
        reasons["dtype"] = f"the GPU {'has' if bf16 else 'has no'} bfloat16 units"
        return torch.bfloat16 if bf16 else torch.float16
    bf16 = bool(torch.cpu._is_avx512_bf16_supported())
    reasons["dtype"] = f"the CPU {'has' if bf16 else 'has no'} bfloat16 instructions"
    return torch.bfloat16 if bf16 else torch.float32


def _exactness(
    config: TargetConfig, device: torch.device, kernels: Kernels, reasons: dict[str, str]
) -> bool:
    possible = kernels.exact and device.type == "cpu"
    if config.exactness == "exact" and not possible:
        raise ConfigError(
            f"exactness: 'exact' is not available with the {kernels.name} kernels on "
            f"{device.type}; use 'fast', or device='cpu'"
        )
    if config.exactness == "fast":
        reasons["exactness"] = "fast, as set: near ties may fall differently in another batch"
        return False
    exact = "exact: a row's result never depends on the rows beside it"
    fast = "fast: these kernels may round differently in another batch"
    reasons["exactness"] = exact if possible else fast
    return possible
