"""The whole engine on a CUDA device, and a step of training there, against the same on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY_VOCAB, EngineFactory, ids, run

from specserve.config import TargetConfig
from specserve.engine.device import choose_platform
from specserve.models.checkpoint import read_checkpoint
from specserve.models.shape import ModelShape
from specserve.types import SamplingParams
from specserve_drafts.tune.eagle import EagleMethod, EagleSettings
from specserve_drafts.tune.head_training import Stepped, Trainer
from specserve_drafts.tune.teacher import Teacher
from specserve_drafts.tune.texts import Text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [
    (1, 2, 3, 4, 1, 2, 3, 4, 1, 2),
    tuple(range(20, 60)),
    (7,),
    tuple((11 * i) % 90 for i in range(150)),
]
SETTINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=32, seed=0),
    "everything": SamplingParams(
        temperature=0.9,
        top_p=0.95,
        presence_penalty=0.4,
        repetition_penalty=1.2,
        logit_bias={5: 3.0, 9: -20.0},
        max_tokens=32,
        seed=2**62,
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "draft", ["none", "ngram", "recycle", "suffix", "draft_lm", "eagle3", "eagle1", "medusa"]
)
def test_output_is_that_of_the_cpu(
    draft: str,
    setting: str,
    make_engine: EngineFactory,
    tiny_draft: Path,
    tiny_heads: list[Path],
    tiny_medusa: Path,
) -> None:
    """In float32 no near tie of a random model falls differently."""
    paths = {"draft_lm": tiny_draft, "medusa": tiny_medusa}
    paths |= dict(zip(("eagle3", "eagle1"), tiny_heads, strict=True))
    params = SETTINGS[setting]
    plain = [ids(outputs) for outputs in run(make_engine("none"), PROMPTS, params)]
    engine = make_engine(str(paths.get(draft, draft)), device="cuda", max_nodes=8)
    assert engine.info().device.startswith("cuda")
    assert [ids(outputs) for outputs in run(engine, PROMPTS, params)] == plain


def test_training_is_that_of_the_cpu(tiny_model: Path) -> None:
    cpu, cuda = (trained(tiny_model, device) for device in ("cpu", "cuda"))
    for ours, theirs in zip(cuda, cpu, strict=True):
        assert ours.num_tokens == theirs.num_tokens
        assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=1e-3)
        assert ours.accepted.tolist() == pytest.approx(theirs.accepted.tolist(), rel=1e-2)


def trained(target: Path, device: str) -> list[Stepped]:
    """Three steps over the same texts: half the vocabulary, KL and then the hybrid."""
    platform = choose_platform(TargetConfig(device=device, dtype="float32"))
    shape, checkpoint = ModelShape.from_dir(target), read_checkpoint(target)
    method = EagleMethod(EagleSettings(aux_layers=(0, 1, 2)))
    teacher = Teacher(target, platform, "none", method.aux_layers(shape), 64)
    generator = np.random.default_rng(0)
    texts = [
        Text(generator.integers(0, TINY_VOCAB, length).astype(np.int32), 4) for length in (9, 30)
    ]
    token_ids = torch.arange(0, TINY_VOCAB, 2)
    last = teacher.read(texts).last
    trainer = Trainer(EagleSettings(), method, teacher, checkpoint, last, token_ids)
    return [trainer.step(texts, progress) for progress in (0.1, 0.2, 0.5)]
