"""Checks that need torch: GPUs, driver, and what the engine will use with the given settings."""

import ctypes

import torch

from specserve.cache.storage import KVSpec
from specserve.cli.machine import Check, first_line, gib
from specserve.config import ConfigError, EngineConfig
from specserve.engine.device import Platform, choose_platform
from specserve.engine.memory import count_blocks
from specserve.hub import ALIASES, HubError, is_hub_id, local_directory
from specserve.models.checkpoint import read_checkpoint
from specserve.models.fields import ModelError
from specserve.models.generation_config import describe_sampling, read_default_sampling
from specserve.models.memory import free_memory
from specserve.models.quantization.choice import choose_quantization
from specserve.models.shape import ModelShape
from specserve.speculation.registry import drafter_names
from specserve_kernels.host import HOST, reference


def runtime_checks(config: EngineConfig) -> list[Check]:
    """All checks of this module. Downloads nothing and loads no weights."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    cuda, version = torch.version.cuda, torch.__version__
    checks = [*gpus(), *check_driver(first_line(query), driver_cuda(), cuda, version)]
    try:
        platform = choose_platform(config.target)
    except (ValueError, ImportError) as error:
        return [*checks, Check("use", "settings", str(error), "broken")]
    free = f"{gib(free_memory(platform.device))} on {platform.device}"
    use = [*_use(platform), Check("use", "free memory", free)]
    return [*checks, *use, *_target(config, platform)]


def gpus() -> list[Check]:
    """The CUDA devices, and whether this build of torch supports them."""
    if not torch.cuda.is_available():
        return [Check("GPU", "devices", "torch finds none")]
    supported = torch.cuda.get_arch_list()
    checks = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        major, minor = properties.major, properties.minor
        value = f"{properties.name}, capability {major}.{minor}, {gib(properties.total_memory)}"
        # Only major versions are compared: code for X.y also runs on later minor versions of X.
        if any(arch.startswith(f"sm_{major}") for arch in supported):
            checks.append(Check("GPU", f"cuda:{index}", value))
        else:
            fix = f"install a torch built for it (this one has {' '.join(supported)})"
            checks.append(Check("GPU", f"cuda:{index}", value, "broken", fix))
    return checks


def check_driver(
    found: str | None, known: tuple[int, int] | None, built: str | None, torch_version: str
) -> list[Check]:
    """Compares the driver with torch. Arguments are None for what is missing.

    `found`: version of the driver; `known`: newest CUDA version, (major, minor), that the driver
    supports; `built`: CUDA version that torch was built with.
    """
    if known is None:
        value = "no NVIDIA driver" if found is None else f"{found}, but libcuda.so.1 does not load"
        if built is None or found is None:
            return [Check("GPU", "driver", value)]
        return [Check("GPU", "driver", value, "broken", "install the driver's CUDA library")]
    value = f"{found or 'version unknown'}, for CUDA up to {known[0]}.{known[1]}"
    if built is None:
        fix = "install a CUDA build of torch to use the GPU"
        return [Check("GPU", "driver", f"{value}; torch {torch_version} has no CUDA", "note", fix)]
    value += f"; torch {torch_version} was built with CUDA {built}"
    # Within a major version, a newer CUDA also runs on an older driver.
    if int(built.partition(".")[0]) > known[0]:
        fix = f"update the driver, or install a torch built with CUDA {known[0]}"
        return [Check("GPU", "driver", value, "broken", fix)]
    return [Check("GPU", "driver", value)]


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version, (major, minor), that the driver supports; None without libcuda."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def _use(platform: Platform) -> list[Check]:
    chosen = {
        "device": str(platform.device),
        "dtype": str(platform.dtype).removeprefix("torch."),
        "kernels": platform.kernels.name,
        "exactness": "exact" if platform.exact else "fast",
    }
    # A reason may begin with the value.
    reasons = {n: platform.reasons[n].removeprefix(v).lstrip(":, ") for n, v in chosen.items()}
    return [
        *(Check("use", name, f"{value}: {reasons[name]}") for name, value in chosen.items()),
        Check("use", "threads", f"{torch.get_num_threads()} on the CPU"),
        Check("use", "drafters", ", ".join(drafter_names())),
        _host_kernels(),
    ]


def _host_kernels() -> Check:
    if HOST is not reference:
        return Check("use", "drafting", "compiled")
    fix = "unset SPECSERVE_KERNELS, or install specserve again with a C++ compiler"
    return Check("use", "drafting", "in Python, which takes three times as long", "note", fix)


def _target(config: EngineConfig, platform: Platform) -> list[Check]:
    name = config.target.target
    try:
        directory = local_directory(name)
        if directory is None:
            known = name in ALIASES or is_hub_id(name)
            missing = f"{name}: not fetched yet" if known else f"{name}: unknown"
            fix = f"specserve pull {name}" if known else f"aliases: {', '.join(sorted(ALIASES))}"
            return [Check("use", "target", missing, "note" if known else "broken", fix)]
        shape = ModelShape.from_dir(directory)
        choice = choose_quantization(
            config.target.quantization,
            shape,
            read_checkpoint(directory),
            platform.kernels,
            platform.device,
            platform.dtype,
            platform.packed_kv_dtype,
        )
        sampling = read_default_sampling(
            directory, config.target.generation_config, shape.vocab_size
        )
        estimate = _kv_estimate(config, platform, shape, choice.packed)
    except (HubError, ModelError, ConfigError) as error:
        return [Check("use", "target", str(error), "broken")]
    words = f"{shape.architecture}, {shape.num_layers} layers, {directory}"
    weights = f"{choice.weights}: {choice.reason}"
    return [
        Check("use", "target", words),
        Check("use", "weights", weights),
        Check("use", "KV", estimate),
        Check("use", "sampling defaults", describe_sampling(sampling)),
    ]


def _kv_estimate(config: EngineConfig, platform: Platform, shape: ModelShape, packed: bool) -> str:
    """The size of the KV pool, estimated without drafts and before the weights are loaded."""
    dtype = platform.packed_kv_dtype if packed else platform.dtype
    spec = KVSpec(shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype)
    context = config.target.max_model_len or shape.max_position_embeddings
    max_num_seqs, device = config.schedule.max_num_seqs, platform.device
    num_blocks = count_blocks(config.cache, spec.bytes_per_slot, context, max_num_seqs, device)
    num_slots = num_blocks * config.cache.block_size
    return (
        f"{num_slots} tokens in {gib(num_slots * spec.bytes_per_slot)}, "
        f"{spec.bytes_per_slot} bytes each, {str(dtype).removeprefix('torch.')}; "
        f"a context holds up to {context}"
    )
