"""Memory in huge pages: zeros of any size, and copies of tensors in shared pages."""

from pathlib import Path

import pytest
import torch

from specserve_kernels import huge_pages
from specserve_kernels.huge_pages import PAGE, Arena


@pytest.mark.parametrize("size", [(0,), (3, 5), (PAGE // 4,), (3, PAGE // 4 + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_zeros(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x = huge_pages.zeros(size, dtype)
    assert x.shape == size
    assert x.dtype == dtype
    assert x.is_contiguous()
    assert not x.any()
    x.fill_(1)
    assert x.all()
    if x.nbytes >= PAGE:
        assert x.data_ptr() % PAGE == 0


def test_arena_copies_equal_the_originals() -> None:
    arena = Arena(chunk_bytes=1000)
    generator = torch.Generator().manual_seed(0)
    originals = [torch.randn(n, 3, generator=generator).to(torch.bfloat16) for n in (5, 90, 1, 400)]
    copies = [arena.copy(x.t()) for x in originals]
    del arena
    for original, copy in zip(originals, copies, strict=True):
        assert torch.equal(copy, original.t())
        assert copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0


def test_huge_pages_are_used_if_enabled() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no huge pages")
    x = huge_pages.zeros((4 * PAGE,), torch.uint8).fill_(1)
    inside, flags = False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= x.data_ptr() < high
        elif inside and first == "VmFlags:":
            flags = line
    assert " hg" in flags, "the memory is not marked for huge pages"
