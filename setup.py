"""The compiled parts; everything else is in pyproject.toml.

All are optional: without a compiler the torch kernels and Python serve.
"""

from glob import glob

import pybind11
from setuptools import Extension, setup

CPU = "kernels/specserve_kernels/cpu"
HOST = "kernels/specserve_kernels/host"
COMMON = ["-std=c++17", "-ffp-contract=off", "-fvisibility=hidden"]

# The same sources once per instruction set; cpu/native.py picks.
BUILDS = {
    "portable": ["-O2", "-Wno-psabi"],  # vectors are passed to inline functions only
    "avx2": ["-O3", "-march=x86-64-v3"],
    "avx512": ["-O3", "-march=x86-64-v4", "-mavx512vnni"],
    "avx512bf16": ["-O3", "-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
}


def extension(folder: str, name: str, arguments: list[str], **more: list[str]) -> Extension:
    return Extension(
        f"{folder.removeprefix('kernels/').replace('/', '.')}.{name}",
        sorted(glob(f"{folder}/csrc/*.cpp")),
        depends=sorted(glob(f"{folder}/csrc/*.h")),
        extra_compile_args=[*COMMON, *arguments],
        optional=True,
        **more,
    )


setup(
    ext_modules=[
        *(
            extension(CPU, f"_{build}", ["-fopenmp", *flags], extra_link_args=["-fopenmp"])
            for build, flags in BUILDS.items()
        ),
        extension(
            HOST,
            "_compiled",
            ["-O2"],
            include_dirs=[pybind11.get_include()],
        ),
    ]
)
