"""`specserve tune prompts` with SmolLM2: it writes prompts like those of users."""

import json
from pathlib import Path

import pytest
from tiny_chat import write_tiny_chat

from specserve.cli.main import main as specserve
from specserve_drafts.tune.prompt_file import training_prompts


def test_a_target_generates_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "prompts.jsonl"
    command = ["tune", "prompts", "--count", "20", "--batch", "4", "--out", str(out)]
    assert specserve(command) == 0
    prompts = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert len(set(prompts)) == 20
    assert not any("<|im" in prompt or prompt != prompt.strip() for prompt in prompts)
    assert all(len(prompt.split()) >= 3 for prompt in prompts)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"; specserve tune recycle --prompts {out} --out DIR")
    assert len(training_prompts(out, [], seed=0).held_out) == 5
    questions = [prompt for prompt in prompts if "?" in prompt or "I" in prompt.split()]
    assert len(questions) > 8
    assert specserve(command) == 2
    assert "out: " in capsys.readouterr().err


def test_a_template_without_turns_is_an_error(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = write_tiny_chat(tiny_model, tmp_path / "tiny")
    out = tmp_path / "prompts.jsonl"
    settings = ["--target", str(target), "--dtype", "float32", "--max-model-len", "128"]
    assert specserve(["tune", "prompts", "--count", "2", "--out", str(out), *settings]) == 2
    assert "target: its chat template has nothing around" in capsys.readouterr().err
    assert not out.exists()
