"""`AsyncLLM`: the engine in an asyncio program, without HTTP."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import write_byte_chat

from specserve import LLM, AsyncLLM, Delta, RequestError, SamplingParams, SpeculationParams
from specserve.async_engine import merge
from specserve.process.engine_process import EngineFailed, EngineUnavailable

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": "4MiB", "threads": 1}
LONG = SamplingParams(temperature=0.7, max_tokens=400, seed=9, ignore_eos=True)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def is_idle(llm: AsyncLLM) -> bool:
    """Whether the engine process runs nothing, waits for nothing and holds no KV slot."""
    stats = llm.engine.stats
    return stats is not None and not (
        stats.num_running or stats.num_waiting or stats.kv_slots_allocated
    )


async def text_of(deltas: AsyncIterator[Delta], index: int = 0) -> str:
    return "".join([delta.text async for delta in deltas if delta.index == index])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_chat(tmp_path_factory.mktemp("async") / "model")


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def llm(runner: asyncio.Runner, model: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(str(model), draft="ngram", **SETTINGS)
    yield runner.run(llm.__aenter__())
    runner.run(llm.__aexit__(None, None, None))


def test_the_answers_are_those_of_llm(runner: asyncio.Runner, llm: AsyncLLM, model: Path) -> None:
    """Text, ids and chats; two samples; logprobs; finish reason and statistics; one bad request."""
    prompts: list[Any] = ["one two", [{"role": "user", "content": "one two"}], (7, 8, 9), [10**6]]
    params = SamplingParams(
        temperature=0.8, seed=3, max_tokens=24, n=2, logprobs=1, prompt_logprobs=1
    )
    with LLM(str(model), draft="ngram", **SETTINGS) as other:
        expected = other.generate(prompts, params)
        answer = other.chat("one two", params)

    async def collect() -> list[list[Delta]]:
        async def one(prompt: Any) -> list[Delta]:
            return [delta async for delta in llm.stream(prompt, params)]

        return await asyncio.gather(*map(one, prompts[:3]))

    same = attrgetter("text", "token_ids", "logprobs", "finish_reason", "stop_reason", "error")
    whole = runner.run(llm.generate(prompts, params))
    whole += runner.run(llm.chat(["one two"], params))
    for ours, theirs in zip(whole, [*expected, *answer], strict=True):
        assert ours.prompt_ids == theirs.prompt_ids
        assert ours.prompt_logprobs == theirs.prompt_logprobs
        assert list(map(same, ours.completions)) == list(map(same, theirs.completions))
    for deltas, generation in zip(runner.run(collect()), expected[:3], strict=True):
        for index, completion in enumerate(generation.completions):
            own = [delta for delta in deltas if delta.index == index]
            assert "".join(delta.text for delta in own) == completion.text
            assert sum((delta.token_ids for delta in own), ()) == completion.token_ids
            assert sum((delta.logprobs for delta in own), ()) == completion.logprobs
            assert own[-1].finish_reason == completion.finish_reason
            stats = own[-1].stats
            assert stats is not None
            assert stats.num_emitted_tokens == len(completion.token_ids)


def test_many_requests_share_the_forward_passes(runner: asyncio.Runner, llm: AsyncLLM) -> None:
    async def scenario() -> tuple[int, int]:
        assert llm.engine.stats is not None
        before = llm.engine.stats.num_steps
        results = await asyncio.gather(*(llm.generate(f"{name} b c", LONG) for name in "abcdef"))
        await until(lambda: is_idle(llm))
        return llm.engine.stats.num_steps - before, sum(len(each[0].token_ids) for each in results)

    num_steps, num_tokens = runner.run(scenario())
    assert num_tokens == 6 * 400
    assert num_steps < num_tokens / 3


def test_a_call_may_have_thousands_of_prompts(runner: asyncio.Runner, llm: AsyncLLM) -> None:
    """More than wait at the tokenizer of a server."""
    params = SamplingParams(temperature=0.0, max_tokens=2)
    results = runner.run(llm.generate([f"prompt {index % 7}" for index in range(1500)], params))
    assert [each.error for each in results] == [None] * 1500
    for index, result in enumerate(results):
        assert result.token_ids == results[index % 7].token_ids


def test_a_cancelled_call_ends_its_requests(runner: asyncio.Runner, llm: AsyncLLM) -> None:
    async def scenario() -> None:
        call = asyncio.create_task(llm.generate(["a b c", "d e f"], LONG))
        await until(lambda: not is_idle(llm))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: is_idle(llm))
        with pytest.raises(TimeoutError):
            await llm.chat(["a b c", "d e f"], LONG, timeout=0.01)
        await until(lambda: is_idle(llm))

    runner.run(scenario())


def test_a_cancelled_stream_leaves_the_engine_and_the_other_one_goes_on(
    runner: asyncio.Runner, llm: AsyncLLM
) -> None:
    async def scenario() -> tuple[str, str, str]:
        alone = await text_of(llm.stream("a b c", LONG))
        started, left = asyncio.Event(), []

        async def leaves() -> None:
            async for delta in llm.stream("x y z", LONG):
                left.append(delta)
                started.set()

        task = asyncio.create_task(leaves())
        await started.wait()
        other = asyncio.create_task(text_of(llm.stream("a b c", LONG)))
        await until(lambda: llm.engine.stats is not None and llm.engine.stats.num_running == 2)
        task.cancel()
        await until(lambda: llm.engine.stats is not None and llm.engine.stats.num_running == 1)
        assert not other.done()
        assert left[-1].finish_reason is None
        beside = await other
        async for _ in llm.stream("x y z", LONG):
            break  # the event loop closes the generator, which ends the request as well
        await until(lambda: is_idle(llm))
        return alone, beside, await text_of(llm.stream("a b c", LONG))

    alone, beside, afterwards = runner.run(scenario())
    assert alone == beside == afterwards


def test_a_bad_request_is_refused_with_the_name_of_its_field(
    runner: asyncio.Runner, llm: AsyncLLM
) -> None:
    async def refusal(prompt: Any, **changes: Any) -> RequestError:
        with pytest.raises(RequestError) as caught:
            await text_of(llm.stream(prompt, **changes))
        return caught.value

    async def scenario() -> list[str]:
        return [
            (await refusal("a", sampling=SamplingParams(top_p=2.0))).param,
            (await refusal("a " * 600)).param,
            (await refusal(["a"])).param,
            (await refusal([10**6])).param,
            (await refusal("a", speculation=SpeculationParams(drafters=("eagle",)))).param,
            (await refusal("a", prediction="b" * 9999)).param,
        ]

    assert runner.run(scenario()) == [
        *("top_p", "prompt", "prompt", "prompt", "speculation.drafters[0]", "prediction")
    ]
    assert llm.engine.process.num_open_streams == 0


def test_a_prediction_changes_no_text_and_is_accepted(
    runner: asyncio.Runner, llm: AsyncLLM
) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)

    async def scenario() -> tuple[list[Delta], list[Delta]]:
        prompt = tuple(range(40, 60))
        first = [delta async for delta in llm.stream(prompt, greedy)]
        known = SpeculationParams(prediction=sum((delta.token_ids for delta in first), ()))
        return first, [delta async for delta in llm.stream(prompt, greedy, speculation=known)]

    first, second = runner.run(scenario())
    assert "".join(each.text for each in first) == "".join(each.text for each in second)
    assert 255 in sum((delta.drafter_ids for delta in second), ())


def test_the_time_limit(runner: asyncio.Runner, llm: AsyncLLM) -> None:
    async def scenario() -> None:
        with pytest.raises(TimeoutError):
            await text_of(llm.stream("a b c", LONG, timeout=0.01))
        await until(lambda: is_idle(llm))

    runner.run(scenario())


def test_close_lets_running_requests_end_and_refuses_new_ones(model: Path) -> None:
    others = children()

    async def scenario() -> None:
        llm = AsyncLLM(str(model), draft="none", **SETTINGS)
        assert llm.engine.state == "stopped"
        for use in (llm.generate("early"), llm.chat("early"), text_of(llm.stream("early"))):
            with pytest.raises(RuntimeError, match="closed"):
                await use
        await llm.start()
        await llm.start()  # no effect
        assert (llm.engine.state, is_idle(llm)) == ("ready", True)
        assert llm.engine.info is not None
        assert llm.engine.info.max_nodes == 8
        running = asyncio.create_task(text_of(llm.stream("a b c", LONG)))
        await until(lambda: not is_idle(llm))
        closing = asyncio.create_task(llm.close(drain_timeout=60.0))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="closed"):
            await text_of(llm.stream("late"))
        assert await closing
        assert running.done()
        assert await running
        assert llm.engine.state == "stopped"
        assert await llm.close()
        await llm.start()  # it can be started again
        cut = asyncio.create_task(text_of(llm.stream("a b c", LONG)))
        await until(lambda: not is_idle(llm))
        pids = children() - others
        assert len(pids) >= 3  # the engine and two tokenizers
        assert not await llm.close()
        with pytest.raises(EngineUnavailable):
            await cut
        assert not children() & pids

    asyncio.run(scenario())


def children() -> set[int]:
    """The ids of the processes that this one has started."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            _, _, rest = file.read_text().rpartition(")")
            if int(rest.split()[1]) == os.getpid():
                found.add(int(file.parent.name))
    return found


def test_settings_that_cannot_work_are_an_error_at_the_start(model: Path) -> None:
    async def scenario() -> None:
        async with AsyncLLM(str(model), **SETTINGS | {"kv_memory": "1KiB"}):
            raise AssertionError

    with pytest.raises(EngineFailed, match="kv_memory"):
        asyncio.run(scenario())


def test_merge_yields_all_items_and_closes_all_streams_after_an_error() -> None:
    closed = []

    async def count(name: str, items: int, error: Exception | None) -> AsyncGenerator[str, None]:
        try:
            for index in range(items):
                await asyncio.sleep(0)
                yield f"{name}{index}"
            if error is not None:
                raise error
            await asyncio.sleep(60 if items == 1 else 0)
        finally:
            closed.append(name)

    async def scenario() -> list[str]:
        async with aclosing(merge([count("a", 2, None), count("b", 3, None)])) as items:
            merged = [item async for item in items]
        with pytest.raises(ValueError, match="stop"):
            async for _ in merge([count("c", 1, None), count("d", 4, ValueError("stop"))]):
                pass
        return merged

    assert sorted(asyncio.run(scenario())) == ["a0", "a1", "b0", "b1", "b2"]
    assert sorted(closed) == ["a", "b", "c", "d"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LLM", "AsyncLLM"])
def test_the_examples_of_the_readme_run_as_they_stand(name: str) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (example,) = (block for block in blocks if f"from specserve import {name}," in block)
    ran = subprocess.run(
        [sys.executable, "-c", example], env=os.environ, capture_output=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr.decode()
    assert len(ran.stdout.split()) > 60
