"""Noise, sampling and penalties against published vectors and plain formulas."""

import math

import numpy as np
import pytest
import torch

from specserve_kernels.cases import sampler_inputs
from specserve_kernels.cpu import CpuKernels
from specserve_kernels.cpu.native import runnable_builds
from specserve_kernels.ops import Kernels
from specserve_kernels.torch_ref import TorchKernels
from specserve_kernels.torch_ref.sampler import gumbel_of_words, philox

REFERENCE = TorchKernels()
NATIVE = [CpuKernels(build) for build in runnable_builds()]
CPU = torch.device("cpu")

each_kernels = pytest.mark.parametrize("kernels", [REFERENCE, *NATIVE], ids=lambda k: str(k.name))
each_native = pytest.mark.parametrize("kernels", NATIVE, ids=lambda k: str(k.name))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that Random123 publishes for philox4x32, 10 rounds
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    words = torch.tensor([int(word, 16) for word in counter.split()])
    key_words = torch.tensor([int(word, 16) for word in key.split()])
    even, odd = philox(words[0::2], words[1::2], key_words)
    result = torch.stack((even, odd), dim=1).flatten().tolist()
    assert " ".join(f"{word:08x}" for word in result) == expected


@each_kernels
def test_noise_is_the_documented_function(kernels: Kernels) -> None:
    seed, position, token = 0x1234567_89ABCDEF, 0x3_00000007, 4 * 11 + 2
    even = torch.tensor([token // 4, position >> 32])
    odd = torch.tensor([position & 0xFFFFFFFF, 0])
    words = philox(even, odd, torch.tensor([seed & 0xFFFFFFFF, seed >> 32]))
    uniform = (words[0][1].item() + 0.5) / 2**32  # word 2 is the second of the even lane
    noise = kernels.gumbel_noise(*map(torch.tensor, ([seed], [position], [[token]])))
    expected = torch.tensor(-math.log(-math.log(uniform)), dtype=torch.float32)
    torch.testing.assert_close(noise[0, 0], expected, rtol=1e-6, atol=0)


def test_noise_is_finite_for_extreme_words() -> None:
    ends = gumbel_of_words(torch.tensor([0.0, 2.0**32 - 1], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([-math.log(33 * math.log(2)), 33 * math.log(2)]))


@each_kernels
@pytest.mark.parametrize("vocab_size", [5, 97, 1000, 4099])
def test_noise_of_a_token_does_not_depend_on_the_call(kernels: Kernels, vocab_size: int) -> None:
    inputs = sampler_inputs(11, vocab_size, CPU)
    every_id = torch.arange(vocab_size).expand(11, -1)
    full = kernels.gumbel_noise(inputs.seeds, inputs.positions, every_id)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 3, 8, 50, 333):
        ids = torch.randint(0, vocab_size, (11, size), generator=generator)
        some = kernels.gumbel_noise(inputs.seeds, inputs.positions, ids)
        assert torch.equal(some, full.gather(1, ids))
    for row in (0, 7):
        alone = kernels.gumbel_noise(
            inputs.seeds[row : row + 1], inputs.positions[row : row + 1], every_id[:1]
        )
        assert torch.equal(alone[0], full[row])


@each_kernels
@pytest.mark.parametrize("vocab_size", [5, 97, 1000, 4099])
def test_argmax_uses_the_same_noise(kernels: Kernels, vocab_size: int) -> None:
    inputs = sampler_inputs(23, vocab_size, CPU)
    arguments = (inputs.seeds, inputs.positions)
    best = kernels.gumbel_argmax(inputs.logits, *arguments, inputs.sampled)
    noise = kernels.gumbel_noise(*arguments, torch.arange(vocab_size).expand(23, -1))
    scores = torch.where(inputs.sampled[:, None], inputs.logits + noise, inputs.logits)
    assert best.tolist() == [int(np.argmax(row)) for row in scores.numpy()]
    assert bool(inputs.logits.gather(1, best[:, None]).isfinite().all())
    for row in range(0, 23, 5):
        only = slice(row, row + 1)
        alone = kernels.gumbel_argmax(
            inputs.logits[only], inputs.seeds[only], inputs.positions[only], inputs.sampled[only]
        )
        assert torch.equal(alone, best[only])


@each_native
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 5000])
def test_native_sampler_matches_the_reference(
    kernels: Kernels, vocab_size: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    num_rows = 40
    logits = torch.randn(num_rows, vocab_size, generator=generator) * spread
    logits[1::4, : vocab_size // 2] = -torch.inf
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator)
    positions = torch.arange(num_rows) << 29
    every_id = torch.arange(vocab_size).expand(num_rows, -1)
    sampled = torch.arange(num_rows) % 5 != 0
    # float64 logarithms of two libraries: at most a last bit of float32 apart.
    noise = kernels.gumbel_noise(seeds, positions, every_id)
    torch.testing.assert_close(
        noise, REFERENCE.gumbel_noise(seeds, positions, every_id), rtol=1.2e-7, atol=0
    )
    drawn = kernels.gumbel_argmax(logits, seeds, positions, sampled)
    assert torch.equal(drawn, REFERENCE.gumbel_argmax(logits, seeds, positions, sampled))


@each_native
def test_non_finite_logits_give_a_valid_token(kernels: Kernels) -> None:
    for bad in (-torch.inf, torch.inf, torch.nan):
        logits = torch.full((3, 100), bad)
        ones = torch.ones(3, dtype=torch.int64)
        drawn = kernels.gumbel_argmax(logits, ones, ones, torch.tensor([True, False, True]))
        assert ((drawn >= 0) & (drawn < 100)).all()


@each_kernels
@pytest.mark.parametrize("keyed_by", ["seed", "position"])
def test_samples_follow_the_softmax(kernels: Kernels, keyed_by: str) -> None:
    num_draws = 40_000
    counter = torch.arange(num_draws)
    fixed = torch.full((num_draws,), 12345)
    seeds, positions = (counter, fixed) if keyed_by == "seed" else (fixed, counter)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf, 0.5, -3.0, 1.5])
    drawn = kernels.gumbel_argmax(
        logits.expand(num_draws, -1), seeds, positions, torch.ones(num_draws, dtype=torch.bool)
    )
    observed = torch.bincount(drawn, minlength=8).double()
    expected = torch.softmax(logits.double(), 0) * num_draws
    assert observed[4] == 0
    allowed = expected > 0
    chi_square = ((observed - expected)[allowed] ** 2 / expected[allowed]).sum()
    assert chi_square < 22.46  # 6 degrees of freedom, p = 0.001


def test_penalties_match_the_formula() -> None:
    inputs = sampler_inputs(7, 50, CPU)
    before = inputs.logits.clone()
    out = REFERENCE.apply_penalties(
        inputs.logits,
        inputs.prompt_mask,
        inputs.counts,
        inputs.repetition,
        inputs.frequency,
        inputs.presence,
    )
    assert torch.equal(inputs.logits, before)
    for row in range(7):
        for token in range(50):
            logit, count = before[row, token].item(), int(inputs.counts[row, token])
            if count or inputs.prompt_mask[row, token]:
                factor = inputs.repetition[row].item()
                logit = logit / factor if logit > 0 else logit * factor
            logit -= inputs.frequency[row].item() * count
            logit -= inputs.presence[row].item() * (count > 0)
            assert out[row, token].item() == pytest.approx(logit, rel=1e-5, abs=1e-5)


def test_neutral_penalties_change_no_bits() -> None:
    inputs = sampler_inputs(5, 64, CPU)
    one, zero = torch.ones(5), torch.zeros(5)
    out = REFERENCE.apply_penalties(
        inputs.logits, inputs.prompt_mask, inputs.counts, one, zero, zero
    )
    assert torch.equal(out, inputs.logits)
