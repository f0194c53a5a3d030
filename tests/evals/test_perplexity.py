"""The perplexity eval against transformers, and a whole run."""

import argparse
import math
from pathlib import Path

import msgspec
import pytest
import torch
from tiny_chat import write_byte_chat, write_chat_prompts
from transformers import AutoModelForCausalLM

from specserve.cache.storage import KVStorage
from specserve.config import TargetConfig
from specserve.engine.device import choose_platform
from specserve.models.loader import load_model
from specserve.text import Tokenizer
from specserve_evals import perplexity
from specserve_evals.perplexity import Report, main, read_windows, window_loss


def windows_of(model: Path, text: Path, tokens: int, window: int) -> list[list[int]]:
    args = argparse.Namespace(text=text, tokens=tokens, window=window)
    return read_windows(args, Tokenizer(model))


@pytest.mark.parametrize("pass_rows", [512, 64, 40])
def test_the_loss_is_that_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pass_rows: int
) -> None:
    monkeypatch.setattr(perplexity, "PASS_ROWS", pass_rows)
    directory = write_byte_chat(tmp_path / "model")
    platform = choose_platform(TargetConfig(dtype="float32"))
    model = load_model(
        directory,
        kernels=platform.kernels,
        dtype=torch.float32,
        device=platform.device,
        exact=platform.exact,
    )
    generator = torch.Generator().manual_seed(3)
    vocab_size = model.shape.vocab_size
    tokens: list[int] = torch.randint(0, vocab_size, (150,), generator=generator).tolist()
    loss = window_loss(model, tokens, KVStorage(model.kv_spec, 160, platform.device))
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = reference(torch.tensor([tokens])).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(
        logits, torch.tensor(tokens[1:]), reduction="sum"
    ).item()
    assert loss == pytest.approx(expected, abs=1e-4 * len(tokens))


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_byte_chat(tmp_path / "model")
    prompts = write_chat_prompts(tmp_path / "prompts.jsonl")
    out = tmp_path / "result.json"
    flags = ["--target", str(directory), "--text", str(prompts), "--dtype", "float32"]
    formats = ["--quantization", "none", "--quantization", "none"]
    assert main([*flags, *formats, "--tokens", "40", "--window", "16", "--out", str(out)]) == 0
    report = msgspec.json.decode(out.read_bytes(), type=Report)
    sizes = [len(window) - 1 for window in windows_of(directory, prompts, 40, 16)]
    assert report.num_predicted == sum(sizes)
    first, again = report.formats
    assert first.perplexity == pytest.approx(math.exp(sum(first.window_losses) / sum(sizes)))
    assert first.window_losses == again.window_losses
    assert (again.ratio, again.log_ratio_error) == (1.0, 0.0)
    assert "written" in capsys.readouterr().out


def test_a_text_without_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_byte_chat(tmp_path / "model")
    (tmp_path / "empty.txt").write_text("")
    flags = ["--target", str(directory), "--text", str(tmp_path / "empty.txt")]
    assert main([*flags, "--quantization", "none"]) == 2
    assert "--text empty.txt: 0 tokens" in capsys.readouterr().err
