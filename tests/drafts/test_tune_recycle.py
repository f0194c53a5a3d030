"""`specserve tune recycle`: the files it writes, resuming, and using the draft."""

import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_chat import write_tiny_chat
from tune_target import assert_served

from specserve.cli.main import main as specserve
from specserve.llm import LLM
from specserve.types import SamplingParams
from specserve_drafts.recycle.topk_table import TABLE_FILE, TopKTable
from specserve_drafts.tune import clock, prompt_file, recycle
from specserve_drafts.tune.prompt_file import NGRAM, training_prompts
from specserve_drafts.tune.recycle import RecycleSettings, TableMade
from specserve_drafts.tune.run_state import LOCK, claimed
from specserve_evals import progress

FLAGS = ["--dtype", "float32", "--device", "cpu", "--max-model-len", "128", "--max-tokens", "12"]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model and enough prompts for two chunks."""
    monkeypatch.setattr(recycle, "CHUNK", 8)
    monkeypatch.setattr(prompt_file, "HELD_OUT", 3)
    write_tiny_chat(tiny_model, tmp_path / "tiny")
    rows = [json.dumps({"prompt": f"w{n} w{n + 1} w{n + 2}"}) for n in range(20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    return tmp_path


def command(folder: Path, *arguments: str) -> list[str]:
    prompts, target = str(folder / "prompts.jsonl"), str(folder / "tiny")
    line = ["--prompts", prompts, "--target", target, "--out", str(folder / "out"), *FLAGS]
    return [*line, "--contexts", "4096", *arguments]


def made(folder: Path) -> TableMade:
    return msgspec.json.decode((folder / "out" / "provenance.json").read_bytes(), type=TableMade)


def test_a_run_makes_a_draft(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(folder, "--tokens", "150", "--batch", "4")
    assert specserve(["tune", "recycle", *arguments]) == 0
    run, out = made(folder), folder / "out"
    assert_served(capsys.readouterr().out, folder, run.gain)
    assert 150 <= run.num_tokens < 150 + 4 * 12
    assert [point.num_tokens for point in run.curve][-1] == run.num_tokens
    assert len(run.curve) == 2
    assert all(point.tau >= 1.0 and point.num_contexts > 0 for point in run.curve)
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert run.provenance.command in (out / "README.md").read_text()
    written = "".join(file.read_text() for file in out.glob("*.[jm][sd]*"))
    assert str(folder) not in written
    assert_it_drafts(folder)


def assert_it_drafts(folder: Path) -> None:
    """Assert that the draft works, under the name of its directory, and accepts trained tokens."""
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": "4MiB"}
    params = SamplingParams(temperature=0.0, max_tokens=12)
    chats = [[{"role": "user", "content": f"w{n} w{n + 1} w{n + 2}"}] for n in range(20)]
    passes = {}
    for draft in ("recycle", str(folder / "out")):
        llm = LLM(str(folder / "tiny"), draft=(draft,), cost_aware=False, **settings)
        assert llm.engine.drafter.names == (Path(draft).name,)
        answers = [llm.generate(chat, params)[0] for chat in chats]
        passes[draft] = sum(answer.stats.num_spec_steps for answer in answers)
    assert passes[str(folder / "out")] < passes["recycle"]


def test_a_stopped_run_is_resumed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed after the first of two chunks ends with as many table entries.

    Acceptance rates are measured again, which changes the order of a tree's nodes, and so which
    entry of a full bucket is replaced.
    """
    arguments = ["--tokens", "150", "--batch", "1"]
    assert recycle.main(command(folder, *arguments)) == 0
    (folder / "out").rename(folder / "whole")
    save, saved = TopKTable.save, list[Path]()

    def stop_after_one(table: TopKTable, path: Path) -> None:
        if saved:
            raise KeyboardInterrupt
        save(table, path)
        saved.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(TopKTable, "save", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            recycle.main(command(folder, *arguments))
    assert recycle.main(command(folder, *arguments)) == 2
    assert "holds a run; add --resume" in capsys.readouterr().err
    assert recycle.main(command(folder, *arguments, "--resume", "--seed", "5")) == 2
    assert "seed: 5 goes on with a run that had 0" in capsys.readouterr().err
    assert recycle.main(command(folder, *arguments, "--resume")) == 0
    tables = [TopKTable.load(folder / name / TABLE_FILE, 100) for name in ("whole", "out")]
    assert tables[0].num_filled == pytest.approx(tables[1].num_filled, rel=0.01)
    assert tables[0].num_filled > 300


def test_the_limit_in_minutes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command takes the given time, and a resumed one what is left of it."""
    monkeypatch.setattr(RecycleSettings, "seconds", 5)
    started = time.monotonic()
    assert recycle.main(command(folder, "--minutes", "1")) == 0
    assert 3.5 < time.monotonic() - started < 5.5
    first = made(folder)
    assert first.gain.num_prompts >= 1
    monkeypatch.setattr(RecycleSettings, "seconds", 7)
    resumed = time.monotonic()
    assert recycle.main(command(folder, "--minutes", "1", "--resume")) == 0
    assert time.monotonic() - resumed < 4
    assert made(folder).num_tokens > first.num_tokens


def test_progress_moves_whatever_the_run_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(clock, "SHOW_EVERY_S", 0.001)
    assert recycle.main(command(folder, "--tokens", "300", "--batch", "1")) == 0
    lines = capsys.readouterr().err.splitlines()
    done = [int(line.split()[0]) for line in lines]
    assert done == sorted(done)
    assert len(set(done)) > 20
    assert all(any(word in line for line in lines) for word in ("loading", "tau", "measuring"))


def test_the_table_is_saved_while_answers_grow(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no pause between two saves, after every forward pass."""
    monkeypatch.setattr(recycle, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(recycle, "draw_curve", lambda *_: None)
    save, saved = TopKTable.save, list[Path]()

    def count(table: TopKTable, path: Path) -> None:
        save(table, path)
        saved.append(path)

    monkeypatch.setattr(TopKTable, "save", count)
    assert recycle.main(command(folder, "--tokens", "20", "--batch", "1")) == 0
    assert len(saved) > 10
    assert len(made(folder).curve) == 1  # of two answers, the first was greedy


def test_few_prompts_are_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of them is held out; `specserve tune prompts` may have made them."""
    monkeypatch.setattr(prompt_file, "HELD_OUT", 32)
    for num_prompts, held_out in ((20, 5), (2, 1)):
        (folder / "prompts.jsonl").write_text("\n".join(f'"w{n}"' for n in range(num_prompts)))
        prompts = training_prompts(folder / "prompts.jsonl", [], seed=0)
        assert (len(prompts.learned), len(prompts.held_out)) == (num_prompts - held_out, held_out)
    assert recycle.main(command(folder, "--tokens", "30")) == 0
    assert made(folder).gain.num_prompts == 1


def test_two_runs_in_one_directory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with claimed(folder / "out"):
        assert recycle.main(command(folder, "--tokens", "50")) == 2
        assert "out: another run is at work in" in capsys.readouterr().err
    assert not (folder / "out").exists(), "the failed run left nothing"
    assert recycle.main(command(folder, "--tokens", "50")) == 0
    assert not (folder / "out" / LOCK).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "nothing.jsonl"], "nothing.jsonl cannot be read"),
        (["--resume"], "state.json cannot be read"),
        (["--contexts", "1000"], "contexts: 1000"),
        (["--max-tokens", "200", "--tokens", "9"], "none of 8 was answered: max_tokens"),
        (["--out", "prompts.jsonl"], "out: prompts.jsonl cannot be used: "),
        (["--out", "a,b"], "out: a,b has a comma"),
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
    assert recycle.main(command(folder, *arguments)) == 2
    assert message in capsys.readouterr().err


def test_prompts_of_an_evaluation_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_file, "HELD_OUT", 1)
    words = [f"word{n}" for n in range(40)]
    same = " ".join(words[:NGRAM]).upper() + ", and then something else"
    rows = [same, " ".join(words[: NGRAM - 1]) + " other words", "hello", *["hello there"] * 3]
    file, asked = tmp_path / "prompts.jsonl", tmp_path / "asked.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    asked.write_text(json.dumps({"turns": ["so: " + " ".join(words)]}) + '\n"Hello!"')
    kept = training_prompts(file, [asked], seed=0)
    texts = [prompt[0]["content"] for prompt in (*kept.learned, *kept.held_out)]
    assert sorted(texts) == sorted((rows[1], "hello there"))
    assert kept.num_excluded == 2
    with pytest.raises(ValueError, match="0 different ones that are in no --exclude"):
        training_prompts(asked, [asked], seed=0)
