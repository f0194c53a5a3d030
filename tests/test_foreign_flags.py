"""Flags of vLLM, SGLang and llama-server get an error that says what to write here."""

import argparse
import re

import pytest

from specserve.cli import main
from specserve.cli.foreign_flags import _OTHERWISE, _RENAMED, ADVICE, OURS
from specserve.cli.parser import build_parser

VLLM = (
    "serve --model Qwen/Qwen3-0.6B --tensor-parallel-size 2 --gpu_memory_utilization=0.9 "
    "--trust-remote-code --enable-prefix-caching --kv-cache-dtype fp8 --api-key secret "
    "--enable-auto-tool-choice --tool-call-parser hermes --disable-log-requests --seed 0 "
    '--speculative-config {"method":"ngram"} --max_model_len 4096 '
    "--max-num-seqs 8 --dtype auto --host 127.0.0.1 --port 9000 --served-model-name a"
)
LLAMA = (
    "serve -m model.gguf -c 4096 -ngl 99 -np 4 -b 512 -ub 512 -fa on -t 8 -a name --api-key secret "
    "-md draft.gguf --draft-max 16 --draft-min 4 --draft-p-min 0.5 -ctk q8_0 --jinja --temp 0.7 "
    "-n 128 --mlock --host 127.0.0.1 --port 8080 --threads 2 --top-k 40"
)
SGLANG = (
    "serve --model-path a/b --tp 2 --mem-fraction-static 0.8 --context-length 4096 "
    "--speculative-algorithm EAGLE --speculative-num-draft-tokens 8 --max-running-requests 4 "
    "--attention-backend triton --log-level info --port 30000"
)
ACCEPTED = {
    *("--max-num-seqs", "--dtype", "--host", "--port", "--served-model-name", "--threads"),
}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command line is answered; it must have exit code 2 and nothing on stdout."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("specserve: error: ")
    return captured.err


def flags_by_command() -> dict[str, set[str]]:
    (commands,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return {name: set(parser._option_string_actions) for name, parser in commands.choices.items()}


@pytest.mark.parametrize("line", [VLLM, LLAMA, SGLANG])
def test_every_flag_of_a_usual_command_line_is_explained(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line.split()
    given = {word.partition("=")[0] for word in words if word.startswith("-")}
    lines = refused(capsys, *words).splitlines()[1:]
    explained = dict(line.strip().split(": ", 1) for line in lines)
    assert set(explained) == given - ACCEPTED
    assert all(explained.values())


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("serve --model x", "--model: no flag of specserve serve; the model has no flag: write "),
        ("serve -hf a/b", "write specserve serve MODEL"),
        ("pull --model x", "write specserve pull MODEL"),
        ("serve -c 4096", "-c: no flag of specserve serve; write --max-model-len"),
        ("serve --ctx-size=4096", "--ctx-size: no flag of specserve serve; write --max-model-len"),
        ("serve --max_num_seqs 3", "--max_num_seqs: no flag of specserve serve; write --max-num"),
        ("serve --sampling-defaults openai", "write --generation-config"),
        ("serve --override-generation-config {}", "these values to --generation-config"),
        ("serve --temp 0", "every request sets temperature itself"),
        ("serve --max-tokens 5", "every request sets max_tokens itself"),
        ("generate --temp 0", "write --temperature"),
        ("generate --alias x", "other commands have it, as --served-model-name"),
        ("chat --api-key x", "SPECSERVE_API_KEY for chat"),
        ("serve --gpu-memory-utilization 0.9", "--kv-memory 20GiB"),
    ],
)
def test_one_flag(line: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, *line.split())
    assert advice in error
    assert len(error.splitlines()) == 1


def test_the_advice_names_flags_that_exist() -> None:
    ours = set().union(*flags_by_command().values())
    assert set(OURS.values()) <= ours
    for advice in ADVICE.values():
        assert set(re.findall(r"--[a-z-]+", advice)) <= ours


def test_no_entry_is_repeated_or_a_flag_of_serve() -> None:
    listed = [
        flag for flags in (*_RENAMED.values(), *_OTHERWISE.values()) for flag in flags.split()
    ]
    assert len(set(listed)) == len(listed)
    assert set(listed).isdisjoint(flags_by_command()["serve"])


def test_other_words_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert build_parser().parse_args(["chat", "--model", "x"]).model == "x"
    assert build_parser().parse_args(["generate", "--prompt=-m"]).prompt == ["-m"]
    evaluation = build_parser().parse_args(["eval", "acceptance", "--model", "x", "-c", "3"])
    assert evaluation.arguments == ["--model", "x", "-c", "3"]
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "--frobnicate"])
    assert "unrecognized arguments: --frobnicate" in capsys.readouterr().err
