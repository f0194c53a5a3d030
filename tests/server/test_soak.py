"""Many mixed requests at once, a third of them cut off; and that the command sees what is wrong."""

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from specserve_evals import soak
from specserve_evals.soak import Report, Round, find_failures
from specserve_evals.soak_requests import CUTS, Sizes, draw
from specserve_evals.vitals import IDLE, PREEMPTIONS, TASKS, ProcessVitals, Vitals

MB = 2**20


def test_a_short_soak_test_releases_everything(chat_model: Path, tmp_path: Path) -> None:
    """With KV for a part of what runs, so that sequences wait and are preempted too."""
    out = tmp_path / "report.json"
    engine = ["--dtype", "float32", "--device", "cpu", "--kv-memory", "96KiB", "--threads", "1"]
    arguments = ["--target", str(chat_model), "--requests", "200", "--concurrency", "64"]
    status = soak.main([*arguments, "--repeats", "16", "--out", str(out), "--", *engine])
    report = msgspec.json.decode(out.read_bytes(), type=Report)
    assert report.failures == ()
    assert status == 0
    assert set(report.cuts) == set(CUTS)
    assert report.num_finished + sum(report.cuts.values()) == 200
    assert report.num_repeated == 16
    assert report.rounds[-1].vitals.metrics[PREEMPTIONS] > 0
    assert str(tmp_path) not in out.read_text()


def test_the_requests_of_a_soak_test() -> None:
    shots = [draw(7, index, Sizes(200, 48)) for index in range(600)]
    assert shots == [draw(7, index, Sizes(200, 48)) for index in range(600)]
    assert sum(shot.cut is not None for shot in shots) == 200
    assert {shot.cut for shot in shots} == {None, *CUTS}
    assert {shot.path for shot in shots} == {"/v1/completions", "/v1/chat/completions"}
    fields = {field for shot in shots for field in shot.body}
    assert {"top_k", "top_p", "min_p", "logit_bias", "stop", "logprobs", "n"} <= fields
    assert {"presence_penalty", "speculation", "prediction", "stream"} <= fields
    prompts = [shot.body["prompt"] for shot in shots if "prompt" in shot.body]
    assert max(map(len, prompts)) <= 201
    assert len({prompt[:40] for prompt in prompts if len(prompt) > 110}) < 10, "nothing is shared"


def vitals(**changes: float) -> Vitals:
    """Of an idle server, or one that is not quite."""
    metrics = dict.fromkeys(IDLE, 0.0) | {TASKS: 9.0}
    sizes = {"http": 100 * MB, "engine": 400 * MB, "tokenizer": 60 * MB}
    processes = [
        ProcessVitals(role, pid, num_fds=20, num_threads=4, rss_bytes=size)
        for pid, (role, size) in enumerate(sizes.items(), start=1)
    ]
    for name, value in changes.items():
        if name == "tasks":
            metrics[TASKS] = value
        elif name == "kv":
            metrics["specserve:kv_slots_allocated"] = value
        elif name == "engine_pid":
            processes[1] = replace(processes[1], pid=int(value))
        else:
            role, field = name.split("_", 1)
            index = ("http", "engine", "tokenizer").index(role)
            processes[index] = replace(processes[index], **{field: int(value)})
    return Vitals(tuple(processes), metrics)


@pytest.mark.parametrize(
    ("at_the_end", "failure"),
    [
        ({"kv": 16}, "specserve:kv_slots_allocated is 16"),
        ({"tasks": 10}, "10 asyncio tasks instead of 9"),
        ({"http_num_fds": 21}, "the http process has 21 open files instead of 20"),
        ({"tokenizer_num_fds": 23}, "the tokenizer process has 23 open files instead of 20"),
        ({"engine_pid": 77}, "the engine process of the baseline has ended"),
        ({"http_rss_bytes": 106 * MB}, "the http process grew by 6.0% in the second half"),
        ({"engine_rss_bytes": 440 * MB}, "the engine process grew by 10.0% in the second half"),
    ],
)
def test_resources_that_are_not_released_are_found(
    at_the_end: dict[str, float], failure: str
) -> None:
    rounds = [Round(50 * part, 1.0, 100, vitals()) for part in (1, 2, 3)]
    end = Round(200, 1.0, 100, vitals(**at_the_end))
    assert find_failures(vitals(), [*rounds, rounds[0]], (), ()) == []
    (found,) = find_failures(vitals(), [*rounds, end], (), ())
    assert found.endswith(failure)


def test_errors_and_other_tokens_are_failures() -> None:
    rounds = [Round(50, 1.0, 100, vitals())] * 4
    found = find_failures(vitals(), rounds, ("500: oh",), ("[1, 2]",))
    assert found == ["error: 500: oh", "differs when repeated alone: [1, 2]"]
