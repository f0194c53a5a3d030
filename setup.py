"""The compiled parts, and where an editable install is found; everything else is in pyproject.toml.

All compiled parts are optional, because the torch kernels and Python serve too; but
SPECSERVE_COMPILED=required makes it an error if one cannot be compiled.
"""

import os
from glob import glob
from pathlib import Path
from typing import Any

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.editable_wheel import editable_wheel

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
        optional=os.environ.get("SPECSERVE_COMPILED") != "required",
        **more,
    )


class EditableWheel(editable_wheel):
    """Lists the folders of the packages in a .pth file.

    By default, setuptools installs an import hook for packages in several folders. Type checkers
    and editors do not see it, and a folder `specserve` in the current directory hides its packages.
    """

    def _select_strategy(self, name: str, tag: str, build_lib: str) -> Any:
        from setuptools.command.editable_wheel import _StaticPth  # needed here only: it is private

        folders = self.distribution.package_dir
        top_level = [name for name in self.distribution.packages if "." not in name]
        roots = {Path(folders.get(name, name)).parent for name in top_level}
        return _StaticPth(self.distribution, name, sorted(roots))


# The files of an extension at once; not its `parallel`, because the extensions of the same sources
# would write to the same object files.
ParallelCompile("MAX_JOBS").install()

setup(
    cmdclass={"editable_wheel": EditableWheel},
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
