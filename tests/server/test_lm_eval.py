"""lm-evaluation-harness against the server: its loglikelihoods are those of the model.

Needs the command `lm_eval` (pip install lm-eval tenacity); without it the test is skipped.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from live import MODEL, start_server
from tiny_chat import write_byte_chat
from transformers import AutoModelForCausalLM

COMMAND = shutil.which("lm_eval")
ROWS = [
    {"question": "The sky is", "choices": ["blue", "green", "loud"], "answer": 0},
    {"question": "Two and two are", "choices": ["four", "a lot of fish"], "answer": 0},
    {"question": "x" * 150, "choices": ["yes", "no"], "answer": 1},
    {"question": "x" * 150 + " and", "choices": ["no", "yes"], "answer": 1},
]
SHARED = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
TASKS: dict[str, dict[str, Any]] = {
    "choosing": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "continuing": {
        "output_type": "loglikelihood",
        "doc_to_target": "{{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
}


def write_tasks(folder: Path) -> None:
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    for name, fields in TASKS.items():
        task = {**SHARED, "task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(json.dumps({**task, **fields}))  # JSON is YAML


def loglikelihood(model: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Of tokens that are bytes; and whether each is the most likely one."""
    before, after = context.encode(), continuation.encode()
    with torch.inference_mode():
        logprobs = model(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
    rows = logprobs[len(before) - 1 : -1]
    chosen = rows.gather(1, torch.tensor([*after])[:, None])
    return float(chosen.sum()), bool((rows.argmax(-1) == torch.tensor([*after])).all())


@pytest.mark.skipif(COMMAND is None, reason="lm_eval is not installed")
@pytest.mark.parametrize("batch_size", [1, 3])
def test_multiple_choice_and_loglikelihood(tmp_path: Path, batch_size: int) -> None:
    directory = write_byte_chat(tmp_path / MODEL)
    write_tasks(tmp_path)
    with start_server(directory, "--dtype", "float32") as server:
        url = f"base_url={server.url}/v1/completions"
        model = f"{url},model={MODEL},tokenizer={directory},tokenizer_backend=huggingface"
        line = [str(COMMAND), "run", "--model", "local-completions", "--model_args"]
        line += [f"{model},num_concurrent=2,max_length=512", "--batch_size", str(batch_size)]
        line += ["--tasks", *TASKS, "--include_path", str(tmp_path)]
        line += ["--output_path", str(tmp_path / "out"), "--log_samples"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(line, env=environment | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name in TASKS:
        (file,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        samples = [json.loads(row) for row in file.read_text().splitlines()]
        assert len(samples) == len(ROWS)
        for sample in samples:
            for arguments, (value, greedy) in zip(
                sample["arguments"].values(), sample["filtered_resps"], strict=True
            ):
                context, continuation = arguments["arg_0"], arguments["arg_1"]
                expected, is_greedy = loglikelihood(reference, context, continuation)
                assert float(value) == pytest.approx(expected, abs=1e-3)
                assert str(greedy) == str(is_greedy)
