"""Exact products and activations: the probe, the ladder, and the bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specserve.models.fields import ModelError
from specserve.models.layers.mlp import swiglu, swiglu_exact
from specserve.models.row_tiles import RowTiles, pad_rows, probe_row_tiles


def test_split_uses_the_largest_proven_sizes() -> None:
    tiles = RowTiles((64, 24, 8))
    assert list(tiles.split(64 + 24 + 16)) == [64, 24, 8, 8]
    assert list(tiles.split(0)) == []
    with pytest.raises(AssertionError, match="12 rows"):
        list(tiles.split(12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_row_keeps_its_bits_in_any_number_of_rows(dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(192, 576, generator=generator).to(dtype)
    offset = torch.randn(192, generator=generator).to(dtype) if bias else None
    tiles = probe_row_tiles(weight, offset)
    assert tiles.sizes[-1] == 8
    x = torch.randn(648, 576, generator=generator).to(dtype)
    whole = tiles.linear(x, weight, offset)
    for num_rows in (8, 16, 40, 136, 520):
        for first in (0, 8, 128 - 8):
            part = tiles.linear(x[first : first + num_rows], weight, offset)
            assert torch.equal(part, whole[first : first + num_rows])
    alone = tiles.linear(pad_rows(x[301:302], 8), weight, offset)
    assert torch.equal(alone[0], whole[301])
    assert tiles.linear(x[:0], weight, offset).shape == (0, 192)


def test_sizes_that_change_a_row_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = F.linear

    def other_bits_from_48_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = real(x, weight, bias)
        if x.shape[0] >= 48:
            out[-1, -1] *= 1 + 2**-20
        return out

    monkeypatch.setattr(F, "linear", other_bits_from_48_rows)
    assert probe_row_tiles(torch.ones(16, 32), None).sizes == (40, 32, 24, 16, 8)


def test_another_order_of_summation_is_seen_behind_the_rounding_to_16_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other_order_from_40_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        products = x.float()[:, None] * weight.float()
        parts = torch.unflatten(products, 2, (8, 8))
        sums = parts.sum(3).sum(2) if x.shape[0] < 40 else parts.sum(2).sum(2)
        return torch.as_tensor(sums, dtype=x.dtype)

    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    monkeypatch.setattr(F, "linear", other_order_from_40_rows)
    assert probe_row_tiles(weight, None).sizes == (32, 24, 16, 8)


def test_a_library_without_exact_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = F.linear

    def by_place(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = real(x, weight, bias)
        return out + torch.arange(x.shape[0])[:, None]

    monkeypatch.setattr(F, "linear", by_place)
    with pytest.raises(ModelError, match=r"16 x 32.*exactness 'fast'"):
        probe_row_tiles(torch.ones(16, 32), None)


def test_probing_a_wide_head_stays_cheap() -> None:
    assert probe_row_tiles(torch.ones(40_000, 1024), None).sizes[0] <= 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [96, 97])
def test_swiglu_exact_is_silu_with_stable_bits(dtype: torch.dtype, size: int) -> None:
    """Two threads meet within row 400, where `F.silu` gives that row of 96 other bits."""
    generator = torch.Generator().manual_seed(0)
    gate_up = 4 * torch.randn(801, 2 * size, generator=generator).to(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = swiglu_exact(gate_up)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(whole, swiglu(gate_up))
    alone = [swiglu_exact(gate_up[row : row + 1]) for row in range(801)]
    assert torch.equal(whole, torch.cat(alone))


def test_swiglu_exact_at_the_ends_of_the_range() -> None:
    gate = torch.tensor([-200.0, -1e38, 200.0, 1e38, 0.0])
    out = swiglu_exact(torch.stack([gate, torch.ones(5)]).reshape(1, -1))
    assert out.tolist() == [[0.0, 0.0, 200.0, pytest.approx(1e38), 0.0]]
