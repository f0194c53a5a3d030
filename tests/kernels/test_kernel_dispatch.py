"""The choice of the kernel backend."""

import os
import subprocess
import sys

import pytest
import torch

from specserve_kernels.cpu.native import runnable_builds
from specserve_kernels.dispatch import select_kernels


def test_default_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECSERVE_KERNELS", raising=False)
    fast = [build for build in runnable_builds() if build != "portable"]
    expected = f"cpu-{fast[-1]}" if fast else "torch"
    assert select_kernels(torch.device("cpu")).name == expected
    pytest.importorskip("triton")
    assert select_kernels(torch.device("cuda")).name == "triton"


def test_environment_variable_overrides_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSERVE_KERNELS", "torch")
    assert select_kernels(torch.device("cuda")).name == "torch"


@pytest.mark.parametrize("build", runnable_builds())
def test_environment_variable_selects_a_build(monkeypatch: pytest.MonkeyPatch, build: str) -> None:
    monkeypatch.setenv("SPECSERVE_KERNELS", f"cpu-{build}")
    assert select_kernels(torch.device("cpu")).name == f"cpu-{build}"


def test_torch_without_native_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specserve_kernels.cpu.native._path", lambda build: None)
    runnable_builds.cache_clear()
    try:
        monkeypatch.delenv("SPECSERVE_KERNELS", raising=False)
        assert select_kernels(torch.device("cpu")).name == "torch"
        for choice in ("cpu", "cpu-avx2"):
            monkeypatch.setenv("SPECSERVE_KERNELS", choice)
            with pytest.raises(ValueError, match=f"'{choice}' cannot run here: .*none; use torch"):
                select_kernels(torch.device("cpu"))
    finally:
        runnable_builds.cache_clear()


def test_unknown_backend_error_lists_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSERVE_KERNELS", "cudnn")
    with pytest.raises(ValueError, match=r"SPECSERVE_KERNELS='cudnn'.*torch, cpu,.*triton"):
        select_kernels(torch.device("cpu"))


def test_the_torch_backend_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from specserve_kernels.dispatch import select_kernels;"
        "print(select_kernels(torch.device('cpu')).name)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"SPECSERVE_KERNELS": "torch"},
    )
    assert result.stdout.strip() == "torch", result.stderr
