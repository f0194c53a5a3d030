"""Loads the compiled kernels: which builds exist, which this CPU can run, their signatures.

The same C++ sources are built once per instruction set. Each build is a shared library that ctypes
calls without holding the GIL. If there was no compiler at install time, there are no builds.
"""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Final

import torch

_ADDRESS = ctypes.c_void_p
_SIZE = ctypes.c_int64
_INT = ctypes.c_int32

# In ascending order: each build needs the CPU features of those before it and more.
BUILDS: Final = ("portable", "avx2", "avx512", "avx512bf16")
_SIGNATURES: Final = {
    "specserve_linear": [_ADDRESS, _INT, _SIZE, _SIZE, _ADDRESS, _SIZE, _ADDRESS, _INT],
    "specserve_attention": [*[_ADDRESS] * 5, _INT, _ADDRESS, _INT],
    "specserve_gumbel_noise": [*[_ADDRESS] * 3, _SIZE, _SIZE, _ADDRESS, _INT],
    "specserve_gumbel_argmax": [_ADDRESS, _SIZE, *[_ADDRESS] * 3, _SIZE, _SIZE, _ADDRESS, _INT],
    "specserve_decode": [*[_ADDRESS] * 4, _INT],
    "specserve_decode_head": [*[_ADDRESS] * 3, _INT],
    "specserve_fuse": [_ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _INT],
    "specserve_expand": [*[_ADDRESS] * 4, _SIZE, _INT],
}


@cache
def runnable_builds() -> tuple[str, ...]:
    """The builds that are installed and that this CPU can run, the best last."""
    if _path("portable") is None:
        return ()
    level = _open("portable").specserve_cpu_level()
    return tuple(build for build in BUILDS[: level + 1] if _path(build) is not None)


@cache
def load(build: str) -> ctypes.CDLL:
    """The library of one of `runnable_builds`."""
    assert build in runnable_builds(), f"{build} is not built or not for this CPU"
    library = _open(build)
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def num_threads() -> int:
    """The size of torch's pool; the libraries use its OpenMP runtime, which is loaded first."""
    return torch.get_num_threads()


def _path(build: str) -> Path | None:
    paths = (Path(__file__).parent / f"_{build}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _open(build: str) -> ctypes.CDLL:
    path = _path(build)
    assert path is not None, f"the {build} build is not installed"
    return ctypes.CDLL(str(path))
