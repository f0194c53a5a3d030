"""`specserve tune medusa`: training, resuming, and using the draft."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY_VOCAB
from tune_target import NUM_PROMPTS, assert_served, prompts, write_predictable

from specserve.cli.main import main as specserve
from specserve.config import TargetConfig
from specserve.engine.device import choose_platform
from specserve.llm import LLM
from specserve.models.checkpoint import read_checkpoint
from specserve.models.shape import ModelShape
from specserve.speculation.registry import create_drafter
from specserve.types import SamplingParams, SpecStats
from specserve_drafts.medusa import heads as served
from specserve_drafts.medusa.checkpoint import read_medusa
from specserve_drafts.medusa.drafter import MedusaDrafter
from specserve_drafts.tune import answers, head_run, medusa, prompt_file
from specserve_drafts.tune.head_card import HeadMade
from specserve_drafts.tune.head_command import head_parser
from specserve_drafts.tune.head_run import Run
from specserve_drafts.tune.head_state import State
from specserve_drafts.tune.medusa import MedusaMethod, MedusaSettings, write_heads
from specserve_drafts.tune.medusa_model import MedusaHeads, lay_out
from specserve_drafts.tune.settings import read_settings
from specserve_drafts.tune.teacher import Teacher
from specserve_drafts.tune.texts import Text
from specserve_drafts.tune.vocabulary import head_rows

FLAGS = "--dtype float32 --device cpu --max-model-len 128 --max-tokens 24 --max-len 32 --heads 3"
RECIPE = "--draft-vocab 60 --step-tokens 100 --check-every 40 --matrix-lr 0.02 --other-lr 0.01"
EXPERIMENTS = Path(__file__).parents[2] / "drafts" / "experiments"
CPU = torch.device("cpu")
ENGINE: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": "4MiB"}


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model and prompts for three shards."""
    monkeypatch.setattr(head_run, "SHARD_PROMPTS", 8)
    monkeypatch.setattr(answers, "SHARD_PROMPTS", 8)
    monkeypatch.setattr(prompt_file, "HELD_OUT", 4)
    write_predictable(tiny_model, tmp_path / "tiny")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(text) for text in prompts()))
    return tmp_path


def command(folder: Path, *arguments: str) -> list[str]:
    files = ["--prompts", str(folder / "prompts.jsonl"), "--out", str(folder / "out")]
    target = ["--target", str(folder / "tiny")]
    return [*files, *target, *FLAGS.split(), *RECIPE.split(), *arguments]


def state(folder: Path) -> State:
    return msgspec.json.decode((folder / "state.json").read_bytes(), type=State)


def test_a_run_makes_a_draft(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first point of the curve is measured before any training step."""
    arguments = command(folder, "--tokens", "16000", "--repeats", "20")
    assert specserve(["tune", "medusa", *arguments]) == 0
    out = folder / "out"
    run = msgspec.json.decode((out / "provenance.json").read_bytes(), type=HeadMade)
    assert_served(capsys.readouterr().out, folder, run.gain)
    first, last = run.curve[0], run.curve[-1]
    assert (run.method, first.num_steps, first.loss) == ("medusa", 0, None)
    assert last.num_tokens >= 16000
    assert run.num_prompts == NUM_PROMPTS - 4
    assert len(last.conditional) == len(last.accepted) == 3
    assert run.best.conditional[0] > first.conditional[0] + 0.3
    assert run.best.tau > first.tau + 0.3
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert "Medusa-1" in card
    assert run.provenance.command in card
    assert "specserve.cli tune medusa" in card
    written = "".join(file.read_text() for file in out.glob("*.[jm][sd]*"))
    assert str(folder) not in written
    assert not list(out.rglob("*.part"))
    assert_it_drafts(folder)


def assert_it_drafts(folder: Path) -> None:
    """Assert that the draft changes no token and accepts more than untrained heads."""
    drafter = create_drafter(str(folder / "out"), {}, folder / "tiny", Path)
    assert isinstance(drafter, MedusaDrafter)
    untrained = folder / "untrained"
    untrained.mkdir()
    shape = ModelShape.from_dir(folder / "tiny")
    ids = load_file(folder / "out" / "model.safetensors")["token_map"]
    rows = head_rows(read_checkpoint(folder / "tiny"), shape, ids)
    weights = MedusaHeads(shape.hidden_size, 3, CPU).tensors(rows)
    write_heads(untrained, weights, ids, TINY_VOCAB, folder / "tiny")
    plain, _ = answered(folder, "none", 0.0)
    guessed, rate = answered(folder, str(folder / "out"), 0.0)
    assert guessed == plain
    assert rate > 1.4
    assert rate > answered(folder, str(untrained), 0.0)[1] + 0.2
    assert answered(folder, str(folder / "out"), 0.8)[0] == answered(folder, "none", 0.8)[0]


def answered(folder: Path, draft: str, temperature: float) -> tuple[list[list[int]], float]:
    """The token ids, and the mean number of tokens per forward pass that verified a tree."""
    llm = LLM(str(folder / "tiny"), draft=(draft,), cost_aware=False, **ENGINE)
    chats = [[{"role": "user", "content": text}] for text in prompts()]
    out = llm.generate(chats, SamplingParams(temperature=temperature, max_tokens=24, seed=3))
    stats: list[SpecStats] = [answer.stats for answer in out]
    passes = sum(one.num_spec_steps for one in stats)
    rate = sum(one.num_emitted_tokens for one in stats) / max(passes, 1)
    return [list(answer.token_ids) for answer in out], rate


@pytest.mark.parametrize("draft_vocab", [40, TINY_VOCAB])
def test_training_computes_what_serving_computes(
    tiny_model: Path, tmp_path: Path, draft_vocab: int
) -> None:
    """Logits of randomly changed heads for the last rows of a text, against their export."""
    platform = choose_platform(TargetConfig(device="cpu", dtype="float32"))
    shape = ModelShape.from_dir(tiny_model)
    teacher = Teacher(tiny_model, platform, "none", (shape.num_layers,), 64)
    text = Text(np.arange(20, dtype=np.int32), 8)
    heads = MedusaHeads(shape.hidden_size, 3, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    token_ids = torch.arange(TINY_VOCAB - draft_vocab, TINY_VOCAB)
    rows = head_rows(read_checkpoint(tiny_model), shape, token_ids)
    weights = heads.tensors(rows)
    write_heads(tmp_path, weights, token_ids, TINY_VOCAB, tiny_model, torch.float32)
    file = read_medusa(tmp_path, shape)
    assert (file.token_ids is None) == (draft_vocab == TINY_VOCAB)
    last = teacher.read([text]).last
    chains = lay_out([text], teacher.normed(last))
    with torch.no_grad():
        ours = torch.stack([out @ rows.T for out in heads(chains)], dim=1)
    theirs = served.MedusaHeads(file, 3, torch.float32, CPU)(teacher.model.final_norm(last[:-1]), 3)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_targets_of_the_heads_begin_after_the_next_token() -> None:
    """Texts with three, one and two answer tokens: a chain starts at each token but the last."""
    texts = [Text(np.arange(2 + n, dtype=np.int32), 2) for n in (3, 1, 2)]
    rows = torch.arange(6.0)[:, None]
    chains = lay_out(texts, rows)
    assert chains.rows[:, 0].tolist() == [0.0, 1.0, 4.0]
    assert chains.left.tolist() == [2, 1, 1]
    assert chains.step_rows(0).tolist() == [1, 2, 5]
    assert chains.step_rows(1).tolist() == [2, 2, 5]
    assert len(lay_out(texts[1:2], rows[:1]).left) == 0


def test_a_stopped_run_is_resumed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed in its second shard, after the last save, ends with the same heads."""
    arguments = ["--tokens", "1200", "--repeats", "2"]
    assert medusa.main(command(folder, *arguments)) == 0
    (folder / "out").rename(folder / "whole")
    train, steps = Run._train, list[float]()

    def stop(run: Run, progress: float) -> None:
        if len(steps) == 6:
            raise KeyboardInterrupt
        train(run, progress)
        steps.append(progress)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train", stop)
        patch.setattr(head_run, "SAVE_EVERY_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            medusa.main(command(folder, *arguments))
    assert medusa.main(command(folder, *arguments, "--resume", "--heads", "2")) == 2
    assert "heads: 2 goes on with a run that had 3" in capsys.readouterr().err
    assert medusa.main(command(folder, *arguments, "--resume")) == 0
    whole, own = (state(folder / name) for name in ("whole", "out"))
    assert own.num_steps == whole.num_steps > 10
    assert (own.num_tokens, own.passes) == (whole.num_tokens, whole.passes)
    assert own.tensors is not None
    assert own.tensors == whole.tensors
    expected = load_file(folder / "whole" / own.tensors)
    for name, tensor in load_file(folder / "out" / own.tensors).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*-medusa.toml")), ids=lambda f: f.stem)
def test_the_experiment_files_are_valid(file: Path) -> None:
    line = ["--prompts", "prompts.jsonl", "--out", "out"]
    settings, _ = read_settings(head_parser(MedusaMethod).parse_args(line), MedusaSettings, file)
    assert settings.minutes is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nothing.jsonl"], "tune medusa: error: prompts: nothing.jsonl"),
        (["--resume"], "state.json cannot be read"),
        (["--heads", "0"], "heads: 0 is out of range; expected 1 to 16"),
        (["--draft-vocab", "1"], "draft_vocab: 1 is out of range"),
        (["--experiment", "recipe.toml"], "depth: unknown setting"),
    ],
)
def test_error_messages(
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    (folder / "recipe.toml").write_text("depth = 2\n")
    assert medusa.main(command(folder, *arguments)) == 2
    assert message in capsys.readouterr().err
