"""The parts of EAGLE training, each against its definition."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from tiny import TINY_VOCAB
from torch import Tensor

from specserve.cache.storage import KVSpec, KVStorage
from specserve.config import TargetConfig
from specserve.engine.device import choose_platform
from specserve.models.checkpoint import read_checkpoint
from specserve.models.shape import ModelShape
from specserve.speculation.drafter import TargetLayers
from specserve_drafts.eagle.checkpoint import read_head
from specserve_drafts.eagle.head import DraftHead, HeadSegment, build_head_batch
from specserve_drafts.eagle.head_shape import HeadShape
from specserve_drafts.tune.eagle import EagleMethod, EagleSettings
from specserve_drafts.tune.eagle_batch import build_chains
from specserve_drafts.tune.eagle_export import write_head
from specserve_drafts.tune.eagle_init import head_shape, start_from_target
from specserve_drafts.tune.eagle_model import EagleHead
from specserve_drafts.tune.head_loss import Wanted, head_loss
from specserve_drafts.tune.head_training import Trainer, chain_acceptance, schedule
from specserve_drafts.tune.muon import MuonAdamW, orthogonalised
from specserve_drafts.tune.teacher import Teacher
from specserve_drafts.tune.texts import Text, batches, read_texts, whole_texts, write_texts
from specserve_drafts.tune.vocabulary import head_rows

CPU = torch.device("cpu")
AUX_LAYERS = (0, 1, 2)
DRAFT_IDS = torch.arange(0, TINY_VOCAB, 2)
PLATFORM = choose_platform(TargetConfig(device="cpu", dtype="float32"))


def texts(*lengths: tuple[int, int], seed: int = 0) -> list[Text]:
    """Random texts, one per (number of prompt tokens, number of answer tokens)."""
    generator = np.random.default_rng(seed)
    return [
        Text(generator.integers(0, TINY_VOCAB, sum(pair)).astype(np.int32), pair[0])
        for pair in lengths
    ]


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> Teacher:
    return Teacher(tiny_model, PLATFORM, "none", AUX_LAYERS, 64)


def made_head(tiny_model: Path, teacher: Teacher) -> EagleHead:
    """A head initialised from the target and then changed at random, norms included."""
    shape = ModelShape.from_dir(tiny_model)
    head = EagleHead(head_shape(shape, AUX_LAYERS, len(DRAFT_IDS)), 4, CPU)
    last = teacher.read(texts((4, 12))).last
    start_from_target(head, read_checkpoint(tiny_model), shape, last, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return head


@pytest.mark.parametrize("per_group", [1, 2, 3])
def test_training_computes_what_serving_computes(
    tiny_model: Path, tmp_path: Path, teacher: Teacher, per_group: int
) -> None:
    """Logits of every chain of a batch, four steps deep, against the exported checkpoint."""
    shape, some = ModelShape.from_dir(tiny_model), texts((3, 9), (2, 5), (7, 1))
    head = made_head(tiny_model, teacher)
    rows = head_rows(read_checkpoint(tiny_model), shape, DRAFT_IDS)
    weights = head.state_dict()
    write_head(tmp_path, head.shape, weights, rows, DRAFT_IDS, tiny_model, 4, dtype=torch.float32)
    file = read_head(tmp_path, shape)
    assert file.token_ids is not None
    assert file.token_ids.equal(DRAFT_IDS)
    assert file.shape == head.shape
    model = teacher.model
    target = TargetLayers(model.embed, model.final_norm, model.unembed, None)
    served = DraftHead(file, PLATFORM.kernels, target, 64, torch.float32, CPU)
    with torch.no_grad():
        lesson = teacher.read(some)
        batch = build_chains(some, lesson.aux_hidden_states, teacher.embed, per_group)
        steps = list(head(batch))
        logits = [out @ rows.T for out in steps]
    first = chain = 0
    for text in some:
        states = lesson.aux_hidden_states[first : first + text.num_draft_inputs]
        for answer in range(text.num_answer):
            depth = min(4, text.num_answer - answer)
            expected = served_chain(
                served, file.shape, text, states, text.num_prompt - 2 + answer, depth
            )
            ours = torch.stack([logits[step][chain + answer] for step in range(depth)])
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        first, chain = first + text.num_draft_inputs, chain + text.num_answer
    assert chain == len(batch.starts) == 15
    assert first == len(batch.positions)


def served_chain(
    head: DraftHead, shape: HeadShape, text: Text, states: Tensor, start: int, depth: int
) -> Tensor:
    """[depth, draft_vocab] logits of the chain from draft input `start`, computed as in serving."""
    spec = KVSpec(shape.num_layers, shape.num_kv_heads, shape.head_dim, torch.float32)
    kv = KVStorage(spec, 64, CPU)
    slot_list = torch.arange(64, dtype=torch.int32)
    words = np.array([(2 << i) - 1 for i in range(start + 1)], np.uint64)
    tokens = text.tokens.tolist()
    rows = head.fuse(states[: start + 1])
    true = HeadSegment(slot_list, 0, 0, tokens[1 : start + 2], np.arange(start + 1), words)
    out = head(build_head_batch([true], rows, kv))[-1:]
    logits = [head.logits(out)]
    for step in range(1, depth):  # nodes under the root, whose draft input is node 0
        word = np.array([(2 << step) - 1], np.uint64)
        token, position = tokens[start + 1 + step], np.array([start + step])
        node = HeadSegment(slot_list, start, step, [token], position, word)
        out = head(build_head_batch([node], out, kv))
        logits.append(head.logits(out))
    return torch.cat(logits)


def test_texts_read_together_give_the_same_rows(tiny_model: Path, teacher: Teacher) -> None:
    """Texts of one pass do not attend to each other; rows are in the order of `ChainBatch`."""
    some = texts((3, 9), (2, 5), (20, 18))
    together = teacher.read(some)
    for got, index in (
        (together.aux_hidden_states, "num_draft_inputs"),
        (together.last, "num_answer"),
    ):
        assert len(got) == sum(getattr(text, index) for text in some)
    alone = [teacher.read([text]) for text in some]
    states = torch.cat([lesson.aux_hidden_states for lesson in alone])
    assert states.equal(together.aux_hidden_states)
    assert torch.cat([lesson.last for lesson in alone]).equal(together.last)
    p = teacher.likely(together.last, DRAFT_IDS)
    whole = teacher.likely(together.last, None)
    torch.testing.assert_close(whole.sum(-1), torch.ones(len(whole)))
    assert p.equal(whole[:, DRAFT_IDS])


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_hand_written_gradient_equals_autograd(hybrid: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, head, p = random(9, 6), random(11, 6), random(5, 14).softmax(-1)[:, :11]
    rows, weights = torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 1]), random(9).abs()
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss, accepted = head_loss(one, head, Wanted.of(p), rows, weights, hybrid)
    torch.autograd.backward(loss * 2)
    q, target = (other @ head.T).softmax(-1), p[rows]
    expected = (target * (target / q).log()).sum(-1)
    share = torch.minimum(q, target).sum(-1)
    if hybrid:
        mix = (-3 * share.detach()).exp()
        expected = mix * expected + (1 - mix) * (1 - share)
    torch.autograd.backward((expected @ weights) * 2)
    torch.testing.assert_close(loss, expected @ weights)
    torch.testing.assert_close(accepted, share)
    assert one.grad is not None
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
def test_muon_makes_a_matrix_orthogonal(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator) @ torch.diag(torch.logspace(0, -1, shape[1]))
    values = torch.linalg.svdvals(orthogonalised(matrix).double())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_the_optimiser_lowers_the_loss_and_can_be_saved() -> None:
    """Two runs, one of them loaded from its state halfway, take the same steps."""
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(6, 4, generator=generator)

    def steps(weights: dict[str, Tensor], optimiser: MuonAdamW, count: int) -> float:
        for _ in range(count):
            error = weights["m"] + weights["v"] - goal
            for parameter in weights.values():
                parameter.grad = None
            torch.autograd.backward(error.square().sum())
            optimiser.step(matrix_lr=0.2, other_lr=0.05)
        return error.square().sum().item()

    def fresh() -> dict[str, Tensor]:
        return {"m": torch.zeros(6, 4, requires_grad=True), "v": torch.zeros(4, requires_grad=True)}

    one, other = fresh(), fresh()
    first = MuonAdamW(one, weight_decay=0.0)
    before = steps(one, first, 5)
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    with torch.no_grad():
        for name, parameter in other.items():
            parameter.copy_(one[name])
    second = MuonAdamW(other, weight_decay=0.0)
    second.load(saved)
    after = steps(one, first, 30)
    assert steps(other, second, 30) == after
    assert after < 0.2 * before


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [schedule(step / 100) for step in range(101)]
    assert 0 < rates[0] < 0.2
    assert max(rates) == rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_chain_acceptance_counts_as_verification_does() -> None:
    """One text with five answer tokens and one with two."""
    hits = np.array(
        [[1, 0, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]], np.bool_
    )
    left = np.array([5, 4, 3, 2, 1, 2, 1])
    checked = chain_acceptance(hits, left)
    # Passes at 0 (one right), 2 (two right, to the end), then 5 (both right).
    assert checked.tau == 7 / 3
    assert checked.conditional == pytest.approx((5 / 7, 3 / 4, 1 / 2))


def test_texts_are_saved_and_loaded(tmp_path: Path) -> None:
    some = texts((3, 9), (2, 5))
    for case in (some, []):
        write_texts(tmp_path / "shard.safetensors", case)
        back = read_texts(tmp_path / "shard.safetensors")
        assert [text.num_prompt for text in back] == [text.num_prompt for text in case]
        for one, other in zip(back, case, strict=True):
            assert np.array_equal(one.tokens, other.tokens)


def test_whole_texts_count_a_common_prefix_as_the_prompt() -> None:
    rows = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8], [1, 2, 3, 4, 9, 9, 9]]
    some = [Text(np.array(row, np.int32), 4) for row in rows]
    assert [text.num_prompt for text in whole_texts(some)] == [3, 3, 3]
    assert [text.num_prompt for text in whole_texts(some[:1])] == [2]
    assert [text.num_answer for text in whole_texts(some)] == [3, 2, 4]
    assert [text.num_prompt for text in whole_texts(texts((3, 9), (2, 5)))] == [2, 2]


def test_each_text_is_in_one_batch() -> None:
    some = texts(*((3, 1 + n % 7) for n in range(50)))
    parts = batches(some, 40, (0, 1, 2))
    assert sorted(id(text) for part in parts for text in part) == sorted(map(id, some))
    sizes = [sum(text.num_answer for text in part) for part in parts]
    assert len(sizes) == 5
    assert max(sizes) < 55
    assert [[id(t) for t in part] for part in batches(some, 40, (0, 1, 2))] == [
        [id(t) for t in part] for part in parts
    ]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_falls(
    tiny_model: Path, teacher: Teacher, precision: Literal["float32", "bfloat16"]
) -> None:
    """Trained on a few texts many times."""
    settings = EagleSettings(
        depth=3, aux_layers=AUX_LAYERS, precision=precision, matrix_lr=0.02, other_lr=0.01
    )
    some = texts((4, 40), (4, 40))
    checkpoint, method = read_checkpoint(tiny_model), EagleMethod(settings)
    last = teacher.read(some).last
    trainer = Trainer(settings, method, teacher, checkpoint, last, DRAFT_IDS)
    steps = [trainer.step(some, step / 80 * 0.29) for step in range(80)]
    assert steps[-1].loss < 0.5 * steps[0].loss
    assert all(b > a + 0.1 for a, b in zip(steps[0].accepted, steps[-1].accepted, strict=True))
    assert steps[0].num_tokens == 80
    assert 0.2 < steps[0].coverage < 0.8


def test_a_wider_mlp_starts_as_that_of_the_target(tiny_model: Path, teacher: Teacher) -> None:
    checkpoint, some = read_checkpoint(tiny_model), texts((3, 9), (2, 5))
    lesson = teacher.read(some)
    rows = []
    for mlp_size in (None, 100):
        method = EagleMethod(EagleSettings(aux_layers=AUX_LAYERS, mlp_size=mlp_size, depth=1))
        head = method.begin(checkpoint, teacher, lesson.last, len(DRAFT_IDS))
        rows += [*head(method.lay_out(some, lesson, teacher))]
    torch.testing.assert_close(rows[1], rows[0], atol=1e-5, rtol=1e-5)
