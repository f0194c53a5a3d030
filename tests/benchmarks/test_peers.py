"""Comparison with other engines: the protocol of the child processes, and the arithmetic."""

import sys
from pathlib import Path

import pytest
from tiny import write_tiny_llama

from specserve_benchmarks.peer_process import Peer, PeerError
from specserve_benchmarks.peers import common_start, main
from specserve_benchmarks.peers_report import Ratio, Run, table


def settings(model: Path, draft: str) -> dict[str, object]:
    return {
        "target": str(model),
        "draft": [draft],
        "context": 128,
        "batch": 4,
        "engine": {"dtype": "float32"},
    }


def test_a_child_process_answers_several_requests(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, seed=0)
    prompts = [[5, 6, 7], [5, 6, 7, 5, 6, 7, 5, 6]]
    with (
        Peer("plain", "specserve", Path(sys.executable), settings(tmp_path, "none"), {}) as plain,
        Peer("ngram", "specserve", Path(sys.executable), settings(tmp_path, "ngram"), {}) as ngram,
    ):
        answer = plain.generate(prompts, 12)
        assert [len(tokens) for tokens in answer.tokens] == [12, 12]
        assert answer.seconds > 0
        assert ngram.generate(prompts, 12).tokens == answer.tokens
        alone = plain.generate(prompts[:1], 5).tokens[0]
        assert alone == answer.tokens[0][:5]
        with pytest.raises(PeerError, match=r"plain: its process ended with 1:[^$]*context"):
            plain.generate([[5] * 500], 4)


def test_a_python_without_the_engine(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"ModuleNotFoundError: No module named 'llama_cpp'"):
        Peer("llama.cpp", "llama_cpp", Path(sys.executable), {}, {})
    missing = tmp_path / "python"
    with pytest.raises(PeerError, match=r"cannot be run .*give the Python of the environment"):
        Peer("vLLM", "vllm", missing, {}, {})


def test_a_missing_prompt_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, seed=0)
    assert main(["--prompts", str(tmp_path / "none.jsonl"), "--target", str(tmp_path)]) == 2
    assert "peers: error:" in capsys.readouterr().err


def run(engine: str, group: str, repeat: int, seconds: float) -> Run:
    return Run(engine, group, "p", repeat, 1, 10, seconds)


def test_ratios_are_taken_within_a_repeat_and_pooled_over_prompts() -> None:
    runs = [
        *(run("ours", "a", repeat, 1.0) for repeat in (0, 1)),
        *(run("theirs", "a", repeat, 2.0 + repeat) for repeat in (0, 1)),
        *(run("ours", "b", repeat, 3.0) for repeat in (0, 1)),
        *(run("theirs", "b", repeat, 6.0) for repeat in (0, 1)),
    ]
    rows = {(row.group, row.engine): row for row in table(runs, "theirs").rows}
    assert rows["a", "ours"].ratio == Ratio(2.5, 2.0, 3.0)
    assert rows["a", "theirs"].ratio == Ratio(1.0, 1.0, 1.0)
    assert rows["all", "ours"].ratio == Ratio(2.125, 2.0, 2.25)  # 20 in 4 s; in 8 and 9 s
    assert rows["all", "ours"].tokens_per_s == 5.0
    assert str(rows["a", "ours"].ratio) == "2.50 (2.00-3.00)"


def test_length_of_the_common_start_of_two_answers() -> None:
    assert common_start([1, 2, 3], [1, 2, 4]) == 2
    assert common_start([1, 2], [1, 2, 4]) == 2
    assert common_start([5], [1]) == 0
