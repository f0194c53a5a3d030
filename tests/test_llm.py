"""`LLM`: chats, streams, threads, and what `close` releases."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import write_byte_chat

from specserve import LLM, Completion, Delta, GenerationFailed, RequestError, SamplingParams
from specserve.types import Prompt, StepOutput

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": "4MiB", "threads": 1}
LONG = SamplingParams(temperature=0.7, max_tokens=400, seed=9, ignore_eos=True)
CHAT = [{"role": "user", "content": "one two"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_chat(tmp_path_factory.mktemp("llm") / "model")


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(str(model), draft="ngram", **SETTINGS) as llm:
        yield llm


def is_idle(llm: LLM) -> bool:
    """Whether the engine runs nothing, waits for nothing and holds no KV slot."""
    stats = llm.engine.stats()
    return not (stats.num_running or stats.num_waiting or stats.kv_slots_allocated)


def check(deltas: list[Delta], completion: Completion) -> None:
    """The deltas of one completion make exactly this one."""
    assert "".join(delta.text for delta in deltas) == completion.text
    assert sum((delta.token_ids for delta in deltas), ()) == completion.token_ids
    assert sum((delta.logprobs for delta in deltas), ()) == (completion.logprobs or ())
    last = deltas[-1]
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert (last.finish_reason, last.stop_reason) == (
        completion.finish_reason,
        completion.stop_reason,
    )
    assert last.stats is not None
    assert last.stats.num_emitted_tokens == len(completion.token_ids)


PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40),
    "sampled": SamplingParams(temperature=0.9, seed=4, max_tokens=60, n=3, logprobs=2),
    "control tokens": SamplingParams(seed=5, max_tokens=60, skip_special_tokens=False),
    "prompt": SamplingParams(seed=5, max_tokens=9, n=2, prompt_logprobs=2),
    "nothing": SamplingParams(max_tokens=0, prompt_logprobs=0),
    "bytes": SamplingParams(temperature=3.0, seed=6, max_tokens=200, ignore_eos=True),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=list(PARAMS))
@pytest.mark.parametrize("prompt", ["one two three", CHAT, (7, 8, 9)], ids=["text", "chat", "ids"])
def test_a_stream_is_what_generate_returns(llm: LLM, prompt: Any, params: SamplingParams) -> None:
    (expected,) = llm.generate(prompt, params)
    deltas = list(llm.stream(prompt, params))
    for index, completion in enumerate(expected.completions):
        check([delta for delta in deltas if delta.index == index], completion)
    assert len(expected.completions) == params.n
    scores = sum((delta.prompt_logprobs for delta in deltas), ())
    assert scores == (expected.prompt_logprobs or ())


def test_no_text_behind_a_stop_string_is_streamed(llm: LLM) -> None:
    """Every part of a text as the stop string, with and without itself in the text."""
    text = llm.generate("one two", LONG)[0].text
    for start in range(0, 60, 7):
        for keep in (False, True):
            params = SamplingParams(
                temperature=0.7,
                max_tokens=400,
                seed=9,
                ignore_eos=True,
                stop=(text[start : start + 5],),
                include_stop_str_in_output=keep,
            )
            (expected,) = llm.generate("one two", params)
            assert expected.finish_reason == "stop"
            check(list(llm.stream("one two", params)), expected.completions[0])


def test_a_prediction_is_streamed_too_and_accepted(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompt = "one two three"
    expected = llm.generate(prompt, greedy)[0]
    deltas = list(llm.stream(prompt, greedy, prediction=expected.text))
    check(deltas, expected.completions[0])


def test_leaving_a_stream_ends_the_request_and_frees_its_kv(llm: LLM) -> None:
    for delta in llm.stream("a b c", LONG):
        assert not is_idle(llm)
        assert delta.finish_reason is None
        break
    assert is_idle(llm)
    stream = llm.stream("a b c", LONG)
    next(stream)
    stream.close()
    assert is_idle(llm)
    assert list(stream) == []
    llm.stream("never used")
    assert is_idle(llm)


def test_a_stream_that_is_collected_as_garbage_ends_its_request(llm: LLM) -> None:
    """In a cycle of references it ends at any time, such as during a step of another request."""
    (expected,) = llm.generate("x y z", LONG)
    gc.collect()
    for _ in range(30):
        cycle: list[Any] = [llm.stream("a b c", LONG)]
        cycle.append(cycle)
        next(cycle[0])
    del cycle
    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)  # collect all the time
    try:
        ids = sum((delta.token_ids for delta in llm.stream("x y z", LONG)), ())
    finally:
        gc.set_threshold(*thresholds)
    assert ids == expected.token_ids
    assert is_idle(llm)


def test_an_error_of_the_caller_ends_the_requests(llm: LLM) -> None:
    def fail(index: int, text: str) -> None:
        raise KeyError(text)

    with pytest.raises(KeyError):
        llm.generate(["a b c", "d e f"], LONG, on_text=fail)
    assert is_idle(llm)


def test_streams_and_calls_run_together(llm: LLM) -> None:
    """Each has the tokens that it has alone, also if one is left."""
    prompts = ["a b c", "x y z", "k l m"]
    alone = [llm.generate(prompt, LONG)[0].token_ids for prompt in prompts]
    first, second, left = (llm.stream(prompt, LONG) for prompt in prompts)
    parts: list[list[Delta]] = [[next(first)], [next(second)], list(islice(left, 2))]
    assert llm.engine.stats().num_running == 3
    left.close()
    inner = llm.generate(prompts[2], LONG)[0].token_ids
    for delta in first:
        parts[0].append(delta)
        parts[1] += islice(second, 1)
    parts[1] += second
    ids = [sum((delta.token_ids for delta in part), ()) for part in parts]
    assert [*ids[:2], inner] == alone
    assert is_idle(llm)


def test_threads_share_the_forward_passes(llm: LLM) -> None:
    prompts = [f"prompt {index}" for index in range(4)]
    alone = [llm.generate(prompt, LONG)[0].token_ids for prompt in prompts]
    steps = llm.engine.times.num_steps
    results: dict[int, tuple[int, ...]] = {}
    together = threading.Barrier(len(prompts))

    def run(index: int) -> None:
        together.wait()
        if index % 2:
            results[index] = llm.generate(prompts[index], LONG)[0].token_ids
        else:
            results[index] = sum((each.token_ids for each in llm.stream(prompts[index], LONG)), ())

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[index] for index in range(len(prompts))] == alone
    assert llm.engine.times.num_steps - steps < sum(map(len, alone))
    assert is_idle(llm)


def test_a_chat_is_a_conversation_or_several_or_a_question(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8)
    (expected,) = llm.generate([CHAT], params)
    assert llm.chat(CHAT, params)[0].token_ids == expected.token_ids
    assert llm.chat("one two", params)[0].prompt_ids == expected.prompt_ids
    both = llm.chat([CHAT, "one two"], params)
    assert [each.token_ids for each in both] == [expected.token_ids] * 2
    parts = [{"role": "user", "content": [{"type": "text", "text": "one two"}]}]
    assert llm.chat(parts, params)[0].prompt_ids == expected.prompt_ids
    assert llm.chat([]) == []
    (refused,) = llm.chat([{"role": "robot", "content": "a"}])
    assert refused.finish_reason == "error"
    assert "messages[0].role" in (refused.error or "")
    texts: list[str] = []
    llm.chat(CHAT, params, on_text=lambda index, text: texts.append(text), predictions="one")
    assert "".join(texts) == expected.text


def test_a_stream_that_cannot_be_served_is_an_error(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[tuple[Prompt, SamplingParams | None, str]] = [
        ("a", SamplingParams(top_p=2.0), "top_p"),
        ("a " * 600, None, "prompt"),
        ([10**6], None, "prompt"),
        ([{"role": "robot", "content": "a"}], None, "messages[0].role"),
    ]
    for prompt, params, field in cases:
        with pytest.raises(RequestError) as caught:
            next(llm.stream(prompt, params))
        assert caught.value.param == field
    names: list[str] = []

    def step() -> list[StepOutput]:
        return [StepOutput(name, finish="error", error="bad logits") for name in names]

    monkeypatch.setattr(llm.engine, "submit", lambda request: names.append(request.id))
    monkeypatch.setattr(llm.engine, "step", step)
    with pytest.raises(GenerationFailed, match="bad logits"):
        next(llm.stream("a", LONG))
    monkeypatch.undo()
    list(llm.stream("a", SamplingParams(max_tokens=2)))


def test_close_releases_the_model_and_ends_what_runs(model: Path) -> None:
    llm = LLM(str(model), draft=["recycle", "ngram"], **SETTINGS)
    parts = weakref.ref(llm.engine.parts.model), weakref.ref(llm.engine.runner.storage.data)
    stream, unused = llm.stream("a b c", LONG), llm.stream("a b c", LONG)
    next(stream)
    llm.close()
    assert [part() for part in parts] == [None, None]
    for use in (
        lambda: next(stream),
        lambda: next(unused),
        lambda: llm.generate("a"),
        lambda: llm.chat("a"),
        lambda: llm.engine,
    ):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    llm.close()
    assert llm.encode("a") == (97,)


def test_close_while_another_thread_generates(model: Path) -> None:
    num_frozen = gc.get_freeze_count()  # by other tests
    with LLM(str(model), draft="none", **SETTINGS) as llm:
        started = threading.Event()
        errors: list[BaseException] = []

        def run() -> None:
            try:
                llm.generate("a b c", LONG, on_text=lambda index, text: started.set())
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        started.wait(30)
    thread.join(30)
    assert "closed" in str(errors[0])
    assert gc.get_freeze_count() <= num_frozen


@pytest.mark.slow
def test_close_gives_the_memory_of_smollm2_back() -> None:
    program = """
import os
from specserve import LLM, SamplingParams

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

sizes = []
for _ in range(3):
    with LLM("smollm2-135m", kv_memory="256MiB") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=40)
        (expected,) = llm.chat("Why is the sky blue?", params)
        chat = [{"role": "user", "content": "Why is the sky blue?"}]
        assert "".join(delta.text for delta in llm.stream(chat, params)) == expected.text
        used = resident()
    sizes.append((used, resident()))
print(sizes)
assert all(used - left > 100 for used, left in sizes), sizes
assert sizes[2][1] - sizes[0][1] < 120, sizes  # less than the weights of one model
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
