"""Which backend runs where."""

import subprocess
import sys

import pytest
import torch

from specserve_kernels.dispatch import select_kernels


def test_default_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECSERVE_KERNELS", raising=False)
    assert select_kernels(torch.device("cpu")).name == "torch"
    pytest.importorskip("triton")
    assert select_kernels(torch.device("cuda")).name == "triton"


def test_the_variable_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSERVE_KERNELS", "torch")
    assert select_kernels(torch.device("cuda")).name == "torch"


def test_an_unknown_backend_is_named_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSERVE_KERNELS", "cudnn")
    with pytest.raises(ValueError, match=r"SPECSERVE_KERNELS='cudnn'.*torch, triton"):
        select_kernels(torch.device("cpu"))


def test_the_torch_backend_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from specserve_kernels.dispatch import select_kernels;"
        "print(select_kernels(torch.device('cpu')).name)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "torch", result.stderr
