"""`AsyncEngine`: the engine in an asyncio program, without HTTP."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import write_byte_chat

from specserve import LLM, AsyncEngine, RequestError, SamplingParams, SpeculationParams
from specserve.async_engine import merge
from specserve.process.engine_process import EngineFailed, EngineUnavailable
from specserve.text.text_delta import TextDelta

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": "4MiB", "threads": 1}
LONG = SamplingParams(temperature=0.7, max_tokens=400, seed=9, ignore_eos=True)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def is_idle(engine: AsyncEngine) -> bool:
    """Whether the engine process runs nothing, waits for nothing and holds no KV slot."""
    stats = engine.stats
    return stats is not None and not (
        stats.num_running or stats.num_waiting or stats.kv_slots_allocated
    )


async def text_of(deltas: AsyncIterator[TextDelta], choice: int = 0) -> str:
    return "".join([delta.text async for delta in deltas if delta.choice == choice])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_chat(tmp_path_factory.mktemp("async") / "model")


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(runner: asyncio.Runner, model: Path) -> Iterator[AsyncEngine]:
    engine = AsyncEngine.load(str(model), draft="ngram", **SETTINGS)
    yield runner.run(engine.__aenter__())
    runner.run(engine.__aexit__(None, None, None))


def test_the_answers_are_those_of_llm(
    runner: asyncio.Runner, engine: AsyncEngine, model: Path
) -> None:
    """Text, ids and chats; two samples; logprobs; finish reason and statistics."""
    llm = LLM(str(model), draft="ngram", **SETTINGS)
    prompts: list[Any] = ["one two three", [{"role": "user", "content": "one two"}], (7, 8, 9)]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=24, n=2, logprobs=1)
    expected = llm.generate(prompts, params)

    async def collect() -> list[list[TextDelta]]:
        async def one(prompt: Any) -> list[TextDelta]:
            return [delta async for delta in engine.generate(prompt, params)]

        return await asyncio.gather(*map(one, prompts))

    for deltas, generation in zip(runner.run(collect()), expected, strict=True):
        for choice, completion in enumerate(generation.completions):
            own = [delta for delta in deltas if delta.choice == choice]
            assert "".join(delta.text for delta in own) == completion.text
            assert sum((delta.tokens.ids for delta in own), ()) == completion.token_ids
            assert sum((delta.logprobs for delta in own), ()) == completion.logprobs
            assert own[-1].tokens.finish == completion.finish_reason
            stats = own[-1].tokens.stats
            assert stats is not None
            assert stats.num_emitted_tokens == len(completion.token_ids)


def test_a_cancelled_stream_leaves_the_engine_and_the_other_one_goes_on(
    runner: asyncio.Runner, engine: AsyncEngine
) -> None:
    async def scenario() -> tuple[str, str, str]:
        alone = await text_of(engine.generate("a b c", LONG))
        started, left = asyncio.Event(), []

        async def leaves() -> None:
            async for delta in engine.generate("x y z", LONG):
                left.append(delta)
                started.set()

        task = asyncio.create_task(leaves())
        await started.wait()
        other = asyncio.create_task(text_of(engine.generate("a b c", LONG)))
        await until(lambda: engine.stats is not None and engine.stats.num_running == 2)
        task.cancel()
        await until(lambda: engine.stats is not None and engine.stats.num_running == 1)
        assert not other.done()
        assert left[-1].tokens.finish is None
        beside = await other
        async for _ in engine.generate("x y z", LONG):
            break  # the event loop closes the generator, which ends the request as well
        await until(lambda: is_idle(engine))
        return alone, beside, await text_of(engine.generate("a b c", LONG))

    alone, beside, afterwards = runner.run(scenario())
    assert alone == beside == afterwards


def test_a_bad_request_is_refused_with_the_name_of_its_field(
    runner: asyncio.Runner, engine: AsyncEngine
) -> None:
    async def refusal(prompt: Any, **changes: Any) -> RequestError:
        with pytest.raises(RequestError) as caught:
            await text_of(engine.generate(prompt, **changes))
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
    assert engine.process.num_open_streams == 0


def test_a_prediction_changes_no_text_and_is_accepted(
    runner: asyncio.Runner, engine: AsyncEngine
) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)

    async def scenario() -> tuple[list[TextDelta], list[TextDelta]]:
        prompt = tuple(range(40, 60))
        first = [delta async for delta in engine.generate(prompt, greedy)]
        known = SpeculationParams(prediction=sum((delta.tokens.ids for delta in first), ()))
        return first, [delta async for delta in engine.generate(prompt, greedy, speculation=known)]

    first, second = runner.run(scenario())
    assert "".join(each.text for each in first) == "".join(each.text for each in second)
    assert 255 in sum((delta.tokens.drafter_ids for delta in second), ())


def test_the_time_limit(runner: asyncio.Runner, engine: AsyncEngine) -> None:
    async def scenario() -> None:
        with pytest.raises(TimeoutError):
            await text_of(engine.generate("a b c", LONG, timeout=0.01))
        await until(lambda: is_idle(engine))

    runner.run(scenario())


def test_stop_lets_running_requests_end_and_refuses_new_ones(model: Path) -> None:
    async def scenario() -> None:
        engine = AsyncEngine.load(str(model), draft="none", **SETTINGS)
        assert engine.state == "stopped"
        await engine.start()
        with pytest.raises(EngineUnavailable, match="starting"):
            await text_of(engine.generate("early"))
        assert (await engine.wait_ready()).max_nodes == 8
        assert (engine.state, is_idle(engine)) == ("ready", True)
        running = asyncio.create_task(text_of(engine.generate("a b c", LONG)))
        await until(lambda: not is_idle(engine))
        stopping = asyncio.create_task(engine.stop(drain_timeout=60.0))
        await asyncio.sleep(0)
        with pytest.raises(EngineUnavailable, match="being stopped"):
            await text_of(engine.generate("late"))
        assert await stopping
        assert running.done()
        assert await running
        assert engine.state == "stopped"
        await engine.start()  # it can be started again
        await engine.wait_ready()
        cut = asyncio.create_task(text_of(engine.generate("a b c", LONG)))
        await until(lambda: not is_idle(engine))
        assert not await engine.stop()
        with pytest.raises(EngineUnavailable):
            await cut

    asyncio.run(scenario())


def test_settings_that_cannot_work_are_an_error_at_the_start(model: Path) -> None:
    async def scenario() -> None:
        async with AsyncEngine.load(str(model), **SETTINGS | {"kv_memory": "1KiB"}):
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
def test_the_example_of_the_readme_runs_as_it_stands() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = re.findall(r"```python\n(import asyncio\n.*?)```", readme, re.DOTALL)
    assert "AsyncEngine" in example
    ran = subprocess.run(
        [sys.executable, "-c", example], env=os.environ, capture_output=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr.decode()
    assert len(ran.stdout.split()) > 20
