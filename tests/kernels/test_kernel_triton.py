"""Triton against the torch reference on the shared cases; in the interpreter without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specserve_drafts.tune.head_loss import Wanted, loss_by_torch, loss_by_triton
from specserve_kernels.cases import (
    ATTENTION_CASES,
    COMMIT_MOVES,
    AttentionCase,
    sampler_inputs,
)
from specserve_kernels.ops import Kernels
from specserve_kernels.torch_ref import TorchKernels

pytest.importorskip("triton")
from specserve_kernels.triton import TritonKernels

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LARGEST_INTERPRETED = 100_000  # scores
ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="not for the interpreter"))

REFERENCE: Kernels = TorchKernels()
KERNELS: Kernels = TritonKernels()


def sized(case: AttentionCase) -> object:
    # The interpreter keeps bfloat16 as bits and multiplies those.
    on_gpu = case.num_scores > LARGEST_INTERPRETED or case.dtype == torch.bfloat16
    marks = ON_GPU if on_gpu else ()
    return pytest.param(case, marks=marks, id=case.name)


@pytest.mark.parametrize("case", [sized(case) for case in ATTENTION_CASES])
def test_attention(case: AttentionCase) -> None:
    inputs = case.build(DEVICE)
    results = []
    for kernels in (REFERENCE, KERNELS):
        plan = kernels.plan_attention(inputs.segments, case.num_kv_heads, case.group_size)
        result = kernels.paged_tree_attention(
            inputs.q, inputs.k_cache, inputs.v_cache, plan, scale=inputs.scale, window=case.window
        )
        results.append(result)
    assert results[1].dtype == case.dtype
    tolerance = 1e-5 if case.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


def test_attention_with_a_strided_query() -> None:
    """Queries come as a slice of the fused projection."""
    case = next(case for case in ATTENTION_CASES if case.name == "tree")
    inputs = case.build(DEVICE)
    heads = inputs.q.shape[1]
    fused = torch.cat((inputs.q, torch.full_like(inputs.q, torch.nan)), dim=1)
    plan = KERNELS.plan_attention(inputs.segments, case.num_kv_heads, case.group_size)
    whole, sliced = (
        KERNELS.paged_tree_attention(q, inputs.k_cache, inputs.v_cache, plan, scale=inputs.scale)
        for q in (inputs.q, fused[:, :heads])
    )
    assert torch.equal(whole, sliced)


@pytest.mark.parametrize("head_dim", [8, 80])
def test_kv_write(head_dim: int) -> None:
    fused = torch.randn(5, 6, head_dim, device=DEVICE)
    k, v = fused[:, :3], fused[:, 3:]
    slots = torch.tensor([7, -1, 0, 9, -1], device=DEVICE)
    for dtype in (torch.float32, torch.float16):
        caches = [torch.zeros(2, 10, 3, head_dim, dtype=dtype, device=DEVICE) for _ in range(2)]
        for kernels, cache in zip((REFERENCE, KERNELS), caches, strict=True):
            kernels.kv_write(k, v, cache[0], cache[1], slots)
        assert torch.equal(caches[0], caches[1])


@pytest.mark.slow
def test_all_kernels_compile_without_a_gpu() -> None:
    """The interpreter accepts Python that the compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("moves", COMMIT_MOVES, ids=len)
def test_kv_commit(moves: tuple[tuple[int, int], ...]) -> None:
    pairs = torch.tensor(moves, dtype=torch.int64, device=DEVICE).view(-1, 2)
    src, dst = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
    kv = torch.randn(3, 2, 64, 2, 80, device=DEVICE)
    expected = kv.clone()
    REFERENCE.kv_commit(expected, src, dst)
    KERNELS.kv_commit(kv, src, dst)
    assert torch.equal(kv, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="the interpreter runs one program at a time")
def test_kv_commit_of_many_moves() -> None:
    kv = torch.randn(32, 2, 4096, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    src = torch.arange(1, 4096, device=DEVICE)
    for _ in range(20):
        expected = kv.clone()
        REFERENCE.kv_commit(expected, src, src - 1)
        KERNELS.kv_commit(kv, src, src - 1)
        assert torch.equal(kv, expected)


@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 5), (3, 1000), (4, 9001)])
def test_gumbel(num_rows: int, vocab_size: int) -> None:
    inputs = sampler_inputs(num_rows, vocab_size, DEVICE)
    keys = (inputs.seeds, inputs.positions)
    ids = torch.arange(vocab_size, device=DEVICE).flip(0).expand(num_rows, -1)
    noise = KERNELS.gumbel_noise(*keys, ids)
    torch.testing.assert_close(noise, REFERENCE.gumbel_noise(*keys, ids), rtol=2e-7, atol=1e-7)
    best = KERNELS.gumbel_argmax(inputs.logits, *keys, inputs.sampled)
    assert torch.equal(best, REFERENCE.gumbel_argmax(inputs.logits, *keys, inputs.sampled))


def test_penalties() -> None:
    inputs = sampler_inputs(5, 2050, DEVICE)
    arguments = (
        inputs.logits,
        inputs.prompt_mask,
        inputs.counts,
        inputs.repetition,
        inputs.frequency,
        inputs.presence,
    )
    out = KERNELS.apply_penalties(*arguments)
    torch.testing.assert_close(out, REFERENCE.apply_penalties(*arguments), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("vocab_size", [7, 2048, 5000])
def test_draft_loss(hybrid: bool, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)

    def logits(num_rows: int) -> torch.Tensor:
        return 3 * torch.randn(num_rows, vocab_size, generator=generator).to(DEVICE)

    whole = logits(4).softmax(-1)
    whole[:, ::3] = 0  # tokens that cannot be drafted
    wanted = Wanted.of(whole)
    rows = torch.tensor([2, 0, 0, 3, 1], device=DEVICE)
    weights = torch.tensor([0.5, 1.0, 0.0, 2.0, 0.1], device=DEVICE)
    own = logits(5)
    expected = loss_by_torch(own.clone(), wanted, rows, weights, hybrid)
    for ours, theirs in zip(
        loss_by_triton(own, wanted, rows, weights, hybrid), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
