"""`specserve tune eagle`: the files it writes, resuming, and using the draft."""

import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from tune_target import NUM_PROMPTS, assert_served, prompts, write_predictable

from specserve.cli.main import main as specserve
from specserve.llm import LLM
from specserve.speculation.registry import create_drafter
from specserve.types import SamplingParams
from specserve_drafts.eagle.drafter import EagleDrafter
from specserve_drafts.tune import answers, eagle, head_run, head_training, prompt_file
from specserve_drafts.tune.clock import Clock
from specserve_drafts.tune.eagle import EagleMethod, EagleSettings
from specserve_drafts.tune.head_card import HeadMade
from specserve_drafts.tune.head_command import head_parser
from specserve_drafts.tune.head_run import Run
from specserve_drafts.tune.head_state import State
from specserve_drafts.tune.settings import read_settings
from specserve_drafts.tune.teacher import Teacher
from specserve_drafts.tune.texts import read_texts

FLAGS = "--dtype float32 --device cpu --max-model-len 128 --max-tokens 24 --max-len 32 --depth 3"
RECIPE = "--draft-vocab 60 --step-tokens 100 --check-every 40 --matrix-lr 0.02 --other-lr 0.01"
EXPERIMENTS = Path(__file__).parents[2] / "drafts" / "experiments"


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


def made(folder: Path) -> HeadMade:
    return msgspec.json.decode((folder / "out" / "provenance.json").read_bytes(), type=HeadMade)


def test_a_run_makes_a_draft(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first point of the curve is measured before any training step."""
    arguments = command(folder, "--tokens", "8000", "--repeats", "20")
    assert specserve(["tune", "eagle", *arguments]) == 0
    run, out = made(folder), folder / "out"
    assert_served(capsys.readouterr().out, folder, run.gain)
    first, last = run.curve[0], run.curve[-1]
    assert (first.num_steps, first.num_tokens, first.loss) == (0, 0, None)
    assert last.num_tokens >= 8000
    assert run.num_prompts == NUM_PROMPTS - 4
    assert run.best.conditional[0] > first.conditional[0] + 0.3
    assert run.best.tau > first.tau + 0.4
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert run.provenance.command in (out / "README.md").read_text()
    written = "".join(file.read_text() for file in out.glob("*.[jm][sd]*"))
    assert str(folder) not in written
    assert not list(out.rglob("*.part"))
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert_it_drafts(folder)


def assert_it_drafts(folder: Path) -> None:
    """Assert that the draft accepts most tokens on the prompts that it was trained on."""
    drafter = create_drafter(str(folder / "out"), {}, folder / "tiny", Path)
    assert isinstance(drafter, EagleDrafter)
    assert drafter.aux_layers == (1, 2)
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": "4MiB"}
    llm = LLM(str(folder / "tiny"), draft=(str(folder / "out"),), cost_aware=False, **settings)
    chats = [[{"role": "user", "content": text}] for text in prompts()]
    answers = llm.generate(chats, SamplingParams(temperature=0.0, max_tokens=24))
    passes = sum(answer.stats.num_spec_steps for answer in answers)
    tokens = sum(answer.stats.num_emitted_tokens for answer in answers)
    assert tokens / passes > 1.5


def test_hidden_states_recorded_with_answers_are_those_of_the_teacher(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, also for prompts computed in chunks and for answers that were cut.

    So training need not compute them again.
    """
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_memory": "4MiB"}
    llm = LLM(
        str(folder / "tiny"), draft="none", max_num_seqs=3, max_num_batched_tokens=8, **options
    )
    settings = EagleSettings(max_tokens=24, max_len=32)

    def teacher() -> Teacher:
        return Teacher(folder / "tiny", llm.engine.platform, "none", (0, 1, 2), settings.max_len)

    keeps, reads = teacher(), teacher()
    chats = [[{"role": "user", "content": text}] for text in prompts()]
    made = answers.Answers(llm, chats, settings, folder / "data", keeps, {}, lambda _: None)
    texts = made.shard(0)
    assert len(texts) > 1
    monkeypatch.setattr(keeps, "_pass", pytest.fail)
    kept, read = keeps.read(texts), reads.read(texts)
    assert kept.aux_hidden_states.equal(read.aux_hidden_states)
    assert kept.last.equal(read.last)
    monkeypatch.setattr(reads, "_pass", pytest.fail)
    assert reads.read(texts[::-1]).last[-1].equal(read.last[texts[0].num_answer - 1])


def test_a_stopped_run_is_resumed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed in its second shard, after the last save, ends with the same head."""
    arguments = ["--tokens", "1200", "--repeats", "2"]
    assert eagle.main(command(folder, *arguments)) == 0
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
            eagle.main(command(folder, *arguments))
    assert eagle.main(command(folder, *arguments)) == 2
    assert "holds a run; add --resume" in capsys.readouterr().err
    assert eagle.main(command(folder, *arguments, "--resume", "--depth", "2")) == 2
    assert "depth: 2 goes on with a run that had 3" in capsys.readouterr().err
    assert eagle.main(command(folder, *arguments, "--resume")) == 0
    whole, own = (state(folder / name) for name in ("whole", "out"))
    assert own.num_steps == whole.num_steps > 10
    assert (own.num_tokens, own.passes) == (whole.num_tokens, whole.passes)
    assert own.tensors is not None
    assert own.tensors == whole.tensors
    expected = load_file(folder / "whole" / own.tensors)
    for name, tensor in load_file(folder / "out" / own.tensors).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)


def test_a_head_with_the_whole_vocabulary_exports_no_tensor_of_the_target(folder: Path) -> None:
    assert eagle.main(command(folder, "--answer", "24")) == 0
    arguments = command(folder, "--tokens", "8000", "--repeats", "20", "--mlp-size", "80")
    assert eagle.main([*arguments, "--draft-vocab", "1000"]) == 0
    tensors = load_file(folder / "out" / "model.safetensors")
    assert tensors["layers.0.mlp.up_proj.weight"].shape == (80, 32)
    assert not {"lm_head.weight", "embed_tokens.weight", "d2t", "t2d"} & set(tensors)
    order = load_file(folder / "out" / "token_order.safetensors")["token_ids"].tolist()
    assert sorted(order) == list(range(97))
    shards = (folder / "out" / "data").glob("shard-*")
    seen = Counter(
        token for file in shards for t in read_texts(file) for token in t.tokens.tolist()
    )
    assert [seen[token] for token in order] == sorted((seen[t] for t in range(97)), reverse=True)
    assert_it_drafts(folder)


def test_answers_can_be_made_ahead(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes make them; the training run then makes no more."""
    for part in ("1/2", "2/2"):
        assert eagle.main(command(folder, "--answer", "24", "--part", part)) == 0
        assert "prompts answered; train on them without --answer" in capsys.readouterr().out
    written = {file.name for file in (folder / "out" / "data").iterdir()}
    shards = {f"shard-{index:05}.safetensors" for index in range(3)}
    assert written == {"held_out.safetensors", "settings.json"} | shards
    assert eagle.main(command(folder, "--tokens", "100", "--seed", "1")) == 2
    assert "seed: 1, and the answers in" in capsys.readouterr().err
    (folder / "out" / "state.json").unlink()
    monkeypatch.setattr(answers, "answer_all", pytest.fail)
    assert eagle.main(command(folder, "--tokens", "100")) == 0
    assert len(state(folder / "out").passes) == 3
    with pytest.raises(SystemExit):
        eagle.main(command(folder, "--answer", "24", "--part", "3/2"))
    assert "--part: '3/2': expected K/M" in capsys.readouterr().err


def test_the_embedding_is_exported_if_requested(folder: Path) -> None:
    arguments = ["--tokens", "100", "--embedding", "own"]
    assert eagle.main(command(folder, *arguments)) == 0
    written = load_file(folder / "out" / "model.safetensors")["embed_tokens.weight"]
    target = load_file(folder / "tiny" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(written, target.bfloat16())
    drafter = create_drafter(str(folder / "out"), {}, folder / "tiny", Path)
    assert isinstance(drafter, EagleDrafter)


def state(folder: Path) -> State:
    return msgspec.json.decode((folder / "state.json").read_bytes(), type=State)


def test_a_run_killed_before_its_first_save_starts_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(run: Run, progress: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train", stop)
        with pytest.raises(KeyboardInterrupt):
            eagle.main(command(folder, "--tokens", "200"))
    assert eagle.main(command(folder, "--tokens", "200", "--resume")) == 0
    assert made(folder).curve[-1].num_tokens >= 200


def test_a_run_is_resumed_with_the_same_prompts_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eagle.main(command(folder, "--tokens", "100", "--target", str(folder / "tinny"))) == 2
    assert eagle.main(command(folder, "--tokens", "100")) == 0, "the failed run left nothing"
    left = [folder / "out" / name for name in ("run-9.safetensors", ".run-9.safetensors.1.part")]
    for file in left:
        file.write_bytes(b"of a run that was killed while it saved")
    file = folder / "prompts.jsonl"
    before = file.read_text()
    file.write_text(before + '\n"w1 w5 w9"')
    assert eagle.main(command(folder, "--tokens", "200", "--resume")) == 2
    assert "prompts: 'prompts.jsonl (sha256 " in capsys.readouterr().err
    file.write_text(before)
    assert eagle.main(command(folder, "--tokens", "200", "--resume")) == 0
    assert not any(file.exists() for file in left)


def test_a_nan_loss_ends_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best head so far is exported before."""
    monkeypatch.setattr(head_training, "_CLIP", float("nan"))
    assert eagle.main(command(folder, "--tokens", "2000", "--check-every", "3")) == 2
    assert "matrix_lr: at 0.02 (other_lr 0.01) the loss is no number" in capsys.readouterr().err
    assert all(weight.isfinite().all() for weight in load_file(weights(folder)).values())


def weights(folder: Path) -> Path:
    return folder / "out" / "model.safetensors"


def test_texts_may_be_as_long_as_the_context(folder: Path) -> None:
    """Chains that start at their end exceed it."""
    path = folder / "tiny" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 27}))
    arguments = command(folder, "--tokens", "200", "--max-model-len", "27", "--depth", "16")
    assert eagle.main(arguments) == 0
    texts = read_texts(folder / "out" / "data" / "shard-00000.safetensors")
    assert max(len(text.tokens) for text in texts) == 27


def test_the_limit_in_minutes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run takes the given time, however many tokens that is."""
    monkeypatch.setattr(EagleSettings, "seconds", 6)
    started = time.monotonic()
    assert eagle.main(command(folder, "--minutes", "1", "--share", "0.2")) == 0
    assert 4 < time.monotonic() - started < 6.6
    end, run = state(folder / "out"), made(folder)
    assert end.num_steps > 3
    assert len(end.passes) >= 1
    assert end.answering + end.training + end.checking < end.seconds < run.curve[-1].seconds + 1
    assert run.gain.num_prompts >= 1


@pytest.mark.parametrize(
    ("settings", "wants"),
    [
        ({"share": 0.3, "repeats": 3}, False),
        ({"share": 0.5, "repeats": 3}, True),
        ({"share": 0.3, "repeats": 2}, True),
        ({"share": 0.0, "repeats": 1}, False),
        ({"share": 0.9, "repeats": 3, "tokens": 1000}, False),
        ({"share": 0.0, "repeats": 2, "tokens": 1000}, True),
    ],
)
def test_when_more_answers_are_made(settings: dict[str, Any], wants: bool) -> None:
    """After 40 of 100 seconds of making answers: if each shard was trained on at least twice."""
    run = Run.__new__(Run)
    run.settings = EagleSettings(**settings)
    run.state = State({}, passes=(2, 3), answering=40.0, training=60.0)
    assert run._wants_answers() == wants
    run.state = State({}, passes=(2, 3), shard=1, answering=40.0, training=60.0)  # in its midst
    assert run._wants_answers() == (wants and "tokens" not in settings and settings["share"] > 0.4)


def test_answers_take_their_share_of_the_time_that_is_left() -> None:
    run = Run.__new__(Run)
    run._check_s, run._save_s = 1.0, 0.5
    run.settings = EagleSettings(minutes=1, share=0.25)
    run._clock = Clock(run.settings, None)
    run._clock.resume(20)
    learning = run._clock.end_of_learning - time.monotonic()
    assert 25 < learning < 40
    assert run._room() == pytest.approx(0.25 * (learning - 1.5), abs=0.5)
    run.settings = EagleSettings(tokens=1, share=0.0)
    run._clock = Clock(run.settings, None)
    assert run._room() == math.inf


def test_an_experiment_is_a_file_of_settings(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags override it; a limit of one kind replaces one of the other kind."""
    file = folder / "recipe.toml"
    file.write_text('minutes = 5\ndepth = 2\nseed = 7\ndevice = "cpu"\naux_layers = [0, 2]\n')
    arguments = command(folder, "--experiment", str(file), "--tokens", "100")
    assert eagle.main(arguments) == 0
    settings = made(folder).settings
    assert (settings["depth"], settings["seed"], settings["aux_layers"]) == (3, 7, [0, 2])
    file.write_text("dephts = 2\n")
    assert eagle.main(arguments) == 2
    assert "dephts: unknown setting; did you mean 'depth'?" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*-eagle.toml")), ids=lambda f: f.stem)
def test_the_experiment_files_are_valid(file: Path) -> None:
    line = ["--prompts", "prompts.jsonl", "--out", "out"]
    settings, _ = read_settings(head_parser(EagleMethod).parse_args(line), EagleSettings, file)
    assert settings.minutes is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nothing.jsonl"], "nothing.jsonl cannot be read"),
        (["--resume"], "state.json cannot be read"),
        (["--depth", "0"], "depth: 0 is out of range; expected 1 to 16"),
        (["--temperature", "3"], "temperature: [3.0]"),
        (["--aux-layers", "0", "3"], "aux_layers: [0, 3]; expected different layers of 0 to 2"),
        (["--experiment", "nothing.toml"], "experiment: nothing.toml cannot be read"),
        (["--out", "long.jsonl"], "out: long.jsonl cannot be used: "),
        (["--answer", "8", "--prompts", "few.jsonl"], "few.jsonl has 1 different ones"),
        (["--max-len", "8", "--max-tokens", "2", "--prompts", "long.jsonl"], "within max_len 8"),
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
    long = [" ".join(f"w{(n + k) % 90}" for k in range(20)) for n in range(20)]
    (folder / "long.jsonl").write_text("\n".join(json.dumps(text) for text in long))
    (folder / "few.jsonl").write_text("\n".join(json.dumps(text) for text in [*prompts()[:1]] * 3))
    assert eagle.main(command(folder, *arguments)) == 2
    assert message in capsys.readouterr().err
