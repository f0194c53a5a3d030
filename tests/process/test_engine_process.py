"""The engine process: its outputs, and what happens when it dies, hangs or is stopped."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
from msgspec.structs import replace
from tiny import TINY_VOCAB, EngineFactory, ids, write_tiny_llama

from specserve.config import EngineConfig, load_config
from specserve.process import engine_process
from specserve.process.engine_process import EngineFailed, EngineProcess, EngineUnavailable
from specserve.types import Request, RequestError, SamplingParams, StepOutput

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": "4MiB", "threads": 1}
LOOPS = pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
LONG = SamplingParams(temperature=0.7, max_tokens=400, seed=9, ignore_eos=True)


def config_of(model: Path, **changes: Any) -> EngineConfig:
    return load_config({"target": str(model), "draft": ["ngram"]} | SETTINGS | changes)


def request(index: int, **changes: Any) -> Request:
    """Requests that differ in every relevant field; the same index gives the same request."""
    prompt = tuple((index * 7 + i) % 11 for i in range(5 + index))
    sampling = SamplingParams(
        temperature=(0.0, 0.7, 1.0)[index % 3],
        top_p=0.95,
        logprobs=2 if index % 4 == 0 else None,
        max_tokens=12 + index,
        seed=index,
    )
    return replace(Request(f"q{index}", prompt, sampling), **changes)


def in_process(make_engine: EngineFactory, requests: list[Request]) -> list[tuple[int, ...]]:
    """The ids of each request on an engine in this process, one after the other."""
    answers = []
    for each in requests:
        engine = make_engine("ngram")
        engine.submit(each)
        outputs: list[StepOutput] = []
        while engine.has_work:
            outputs += engine.step()
        answers.append(ids(outputs))
    return answers


async def collect(engine: EngineProcess, request: Request) -> list[StepOutput]:
    async with aclosing(engine.stream(request)) as outputs:
        return await rest_of(outputs)


async def rest_of(outputs: AsyncIterator[StepOutput]) -> list[StepOutput]:
    return [output async for output in outputs]


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def is_running(pid: int) -> bool:
    """Zombies do not count: an orphan may be reaped late."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@asynccontextmanager
async def running(config: EngineConfig, **options: float) -> AsyncIterator[EngineProcess]:
    engine = EngineProcess(config, Path(config.target.target), **options)
    await engine.start()
    try:
        await engine.wait_ready()
        yield engine
    finally:
        await engine.stop()


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(runner: asyncio.Runner, tiny_model: Path) -> Iterator[EngineProcess]:
    """One engine for the tests that do not change its state."""
    context = running(config_of(tiny_model), heartbeat_timeout=1.0)
    yield runner.run(context.__aenter__())
    runner.run(context.__aexit__(None, None, None))


def test_streams_equal_the_output_of_an_engine_in_this_process(
    runner: asyncio.Runner, engine: EngineProcess, make_engine: EngineFactory
) -> None:
    requests = [request(index) for index in range(16)]
    expected = in_process(make_engine, requests)

    async def one_by_one() -> list[list[StepOutput]]:
        return [await collect(engine, each) for each in requests[:4]]

    async def together() -> list[list[StepOutput]]:
        return await asyncio.gather(*(collect(engine, each) for each in requests))

    assert [ids(outputs) for outputs in runner.run(one_by_one())] == expected[:4]
    for outputs, answer, each in zip(runner.run(together()), expected, requests, strict=True):
        assert ids(outputs) == answer
        assert outputs[-1].finish is not None
        assert outputs[-1].stats is not None
        num_logprobs = sum(len(output.logprobs) for output in outputs)
        assert num_logprobs == (len(answer) if each.sampling.logprobs else 0)
    assert engine.num_open_streams == 0


def test_info_and_stats(
    runner: asyncio.Runner, engine: EngineProcess, make_engine: EngineFactory
) -> None:
    here = make_engine("ngram", threads=1).info()  # without a tokenizer
    assert engine.info == replace(here, limits=replace(here.limits, stop_strings=True))
    seen: list[int] = []
    before = engine.stats
    assert before is not None
    engine.on_stats = lambda stats: seen.append(stats.generation_tokens)
    answer = ids(runner.run(collect(engine, request(20))))
    engine.on_stats = lambda stats: seen.append(1 // 0)  # an error in the callback
    assert ids(runner.run(collect(engine, request(20)))) == answer
    engine.on_stats = lambda stats: None
    assert seen[-1] == before.generation_tokens + len(answer)
    assert engine.stats is not None
    assert engine.stats.prompt_tokens == before.prompt_tokens + 50
    assert engine.stats.kv_slots_allocated == 0


def test_closing_a_stream_aborts_the_request(
    runner: asyncio.Runner, engine: EngineProcess, make_engine: EngineFactory
) -> None:
    async def leave() -> None:
        async with aclosing(engine.stream(Request("left", (1, 2, 3), LONG))) as outputs:
            await anext(outputs)
            assert engine.num_open_streams == 1
        assert engine.num_open_streams == 0
        with pytest.raises(RequestError, match="id"):
            await collect(engine, Request("left", (1,), LONG))  # its last outputs may still arrive
        await until(lambda: engine.stats is not None and engine.stats.num_running == 0)
        assert engine.stats is not None
        assert engine.stats.kv_slots_allocated == 0
        assert engine.stats.generation_tokens - before < 400

    assert engine.stats is not None
    before = engine.stats.generation_tokens
    runner.run(leave())
    again = request(3, id="left")
    assert ids(runner.run(collect(engine, again))) == in_process(make_engine, [again])[0]


@pytest.mark.parametrize(
    ("param", "bad"),
    [
        ("prompt", {"prompt_ids": (1, TINY_VOCAB)}),
        ("temperature", {"sampling": SamplingParams(temperature=float("nan"), seed=1)}),
        ("max_tokens", {"sampling": SamplingParams(max_tokens=4096, seed=1)}),
        ("request", {"prompt_ids": ("one",)}),  # a wrong type is never sent
        ("request", {"cache_salt": "\ud800"}),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(
    runner: asyncio.Runner, engine: EngineProcess, param: str, bad: dict[str, Any]
) -> None:
    pid = engine.pid
    with pytest.raises(RequestError) as error:
        runner.run(collect(engine, request(0, **bad)))
    assert error.value.param == param
    assert error.value.message
    assert (engine.pid, engine.num_open_streams) == (pid, 0)
    assert ids(runner.run(collect(engine, request(0))))


def test_a_pause_of_this_process_does_not_count_as_engine_silence(
    runner: asyncio.Runner, engine: EngineProcess
) -> None:
    """A Ctrl-C in the terminal does not end the engine either."""

    async def pause() -> None:
        pid, restarts = engine.pid, engine.num_restarts
        assert pid is not None
        os.kill(pid, signal.SIGINT)
        time.sleep(1.5)  # longer than heartbeat_timeout
        await asyncio.sleep(0.5)
        assert (engine.state, engine.pid, engine.num_restarts) == ("ready", pid, restarts)

    runner.run(pause())


@LOOPS
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_hangs_is_replaced(
    fault: signal.Signals,
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    tiny_model: Path,
    make_engine: EngineFactory,
) -> None:
    expected = in_process(make_engine, [request(5)])[0]

    async def break_it() -> None:
        async with running(config_of(tiny_model), heartbeat_timeout=1.5) as engine:
            pid = engine.pid
            assert pid is not None
            outputs = engine.stream(Request("cut", (1, 2, 3), LONG))
            await anext(outputs)
            os.kill(pid, fault)
            with pytest.raises(EngineUnavailable, match="is being restarted") as error:
                await rest_of(outputs)
            assert error.value.retry_after >= 1.0
            assert (engine.state, engine.stats, engine.num_open_streams) == ("restarting", None, 0)
            with pytest.raises(EngineUnavailable):
                await collect(engine, request(5))
            await engine.wait_ready()
            assert engine.num_restarts == 1
            assert engine.pid != pid
            assert not is_running(pid)
            assert engine.stats is not None
            assert engine.stats.num_steps == 0
            assert ids(await collect(engine, request(5))) == expected

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(break_it())


SLOW = """
import sys, time
if "specserve.process.engine_main" in sys.orig_argv:
    from specserve.runner.runner import Runner
    forward = Runner.forward

    def slow(self, entries, trees):
        for entry in entries:
            rows = entry.num_prefill + entry.num_nodes
            time.sleep(rows * ({row} + {token} * (entry.seq.table.num_committed + rows / 2)))
        return forward(self, entries, trees)

    Runner.forward = slow
"""


@pytest.mark.parametrize(
    ("num_tokens", "max_num_batched_tokens", "slow"),
    [
        (1000, 1024, {"row": 1.6e-3, "token": 0}),
        (1000, 256, {"row": 0, "token": 7e-6}),
    ],
    ids=["many rows", "a long context"],
)
def test_a_slow_step_is_not_taken_for_a_hang(
    num_tokens: int,
    max_num_batched_tokens: int,
    slow: dict[str, float],
    runner: asyncio.Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One step takes longer than `heartbeat_timeout`."""
    model = write_tiny_llama(tmp_path / "model", seed=1, context=2048)
    (tmp_path / "sitecustomize.py").write_text(SLOW.format(**slow))
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of(model, draft=["none"], max_num_batched_tokens=max_num_batched_tokens)

    async def ask() -> None:
        async with running(config, heartbeat_timeout=1.0) as engine:
            sampling = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
            started = time.monotonic()
            outputs = await collect(engine, Request("slow", (1, 2) * (num_tokens // 2), sampling))
            assert time.monotonic() - started > 1.5, "it was not slow"
            assert len(ids(outputs)) == 3
            assert engine.num_restarts == 0

    runner.run(ask())


def test_unusable_settings_are_reported(runner: asyncio.Runner, tiny_model: Path) -> None:
    async def fail() -> None:
        engine = EngineProcess(config_of(tiny_model, max_model_len=4096), tiny_model)
        await engine.start()
        with pytest.raises(EngineFailed, match=r"max_model_len: 4096.*use at most 512"):
            await engine.wait_ready()
        assert (engine.state, engine.pid, engine.num_restarts) == ("failed", None, 0)
        with pytest.raises(EngineUnavailable, match="could not be started"):
            await collect(engine, request(0))
        await engine.stop()

    runner.run(fail())


@pytest.mark.parametrize(
    ("engine_code", "end"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("import os, sys, time; os.write(int(sys.argv[1]), b'?' * 9); time.sleep(60)", "signal 9"),
        ("import time; time.sleep(60)", "signal 9"),
    ],
    ids=["dies", "garbage", "silent"],
)
def test_an_engine_that_never_starts_is_given_up(
    engine_code: str,
    end: str,
    runner: asyncio.Runner,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "broken_engine.py").write_text(engine_code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(engine_process, "_MODULE", "broken_engine")
    monkeypatch.setattr(engine_process, "_MAX_DELAY_S", 0.02)

    async def fail() -> None:
        engine = EngineProcess(config_of(tiny_model), tiny_model, start_timeout=0.4)
        await engine.start()
        with pytest.raises(EngineFailed, match=f"failed to start 5 times: {end}"):
            await engine.wait_ready()
        assert engine.num_restarts == engine_process.MAX_STARTS - 1
        await engine.stop()

    runner.run(fail())


@LOOPS
def test_stop_ends_process_tasks_and_files(
    new_loop: Callable[[], asyncio.AbstractEventLoop], tiny_model: Path
) -> None:
    """While it starts, while it hangs and right after it died."""

    async def start_and_stop() -> int:
        engine = EngineProcess(config_of(tiny_model), tiny_model)
        await engine.start()
        waiting = asyncio.create_task(engine.wait_ready())
        await until(lambda: engine.pid is not None)
        pid = engine.pid
        assert pid is not None
        await engine.stop()
        with pytest.raises(EngineUnavailable, match="has been stopped"):
            await waiting
        return pid

    async def break_and_stop(fault: signal.Signals) -> int:
        async with running(config_of(tiny_model)) as engine:
            outputs = engine.stream(Request("open", (1, 2, 3), LONG))
            await anext(outputs)
            pid = engine.pid
            assert pid is not None
            os.kill(pid, fault)
            if fault is signal.SIGKILL:
                await until(lambda: engine.state == "restarting")
            await engine.stop()
            with pytest.raises(EngineUnavailable, match=r"is being restarted|has been stopped"):
                await rest_of(outputs)
            assert (engine.state, engine.pid, engine.num_open_streams) == ("stopped", None, 0)
        return pid

    async def check() -> None:
        await start_and_stop()  # a loop opens its own files on first use
        files = len(os.listdir("/proc/self/fd"))
        pids = [await start_and_stop()]
        pids += [await break_and_stop(fault) for fault in (signal.SIGSTOP, signal.SIGKILL)]
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)  # not even a zombie
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert len(os.listdir("/proc/self/fd")) == files

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(check())


def test_settings_that_worked_once_are_retried(runner: asyncio.Runner, tmp_path: Path) -> None:
    """For example when the model directory is missing for a while."""
    weights = write_tiny_llama(tmp_path / "model", seed=1) / "model.safetensors"

    async def lose_and_find() -> None:
        async with running(config_of(tmp_path / "model")) as engine:
            assert engine.pid is not None
            weights.rename(tmp_path / "elsewhere")
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: engine.num_restarts == 2)
            assert engine.state == "restarting"
            (tmp_path / "elsewhere").rename(weights)
            await engine.wait_ready()

    runner.run(lose_and_find())


PARENT_PROGRAM = """
import asyncio, sys
from pathlib import Path
import msgspec
from specserve.config import EngineConfig
from specserve.process.engine_process import EngineProcess
from specserve.process.tokenizer_pool import TokenizerPool
from specserve.types import Request, SamplingParams

async def ask(engine):
    async for _ in engine.stream(Request("r", (1, 2), SamplingParams(max_tokens=400, seed=1))):
        pass

async def main():
    config = msgspec.json.decode(sys.argv[1], type=EngineConfig)
    engine = EngineProcess(config, Path(config.target.target))
    pool = TokenizerPool(Path(config.target.target), time_limit=50.0, workers=1)
    await engine.start()
    await engine.wait_ready()
    await pool.start()
    print(engine.pid, *pool.pids, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    asyncio.create_task(ask(engine))
    asyncio.create_task(pool.encode("w1"))
    await asyncio.sleep(0.2)
    print("asked", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


STUCK = """
import ctypes, os, sys
if "specserve.process.engine_main" in sys.orig_argv:
    from specserve.engine.engine import Engine
    step = Engine.step

    def stuck(self):
        if os.path.exists({flag!r}):
            ctypes.PyDLL(None).sleep(60)  # holds the interpreter lock
        return step(self)

    Engine.step = stuck
elif "specserve.process.tokenizer_main" in sys.orig_argv:
    from specserve.text import Tokenizer
    Tokenizer.encode = lambda self, text, **options: ctypes.PyDLL(None).sleep(60)
"""


@pytest.mark.parametrize("stuck", [False, True])
def test_children_end_with_their_parent(
    stuck: bool, runner: asyncio.Runner, tiny_model: Path, tmp_path: Path
) -> None:
    """Even a child that is stuck in native code."""
    config = msgspec.json.encode(config_of(tiny_model)).decode()
    flag = tmp_path / "flag"
    (tmp_path / "sitecustomize.py").write_text(STUCK.format(flag=str(flag)))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", PARENT_PROGRAM, config],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ({"PYTHONPATH": path} if stuck else {}),
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert all(map(is_running, pids))
        flag.touch()
        assert parent.stdin is not None
        print("go", file=parent.stdin, flush=True)
        parent.stdout.readline()  # both children are busy now
        time.sleep(0.5)
        parent.kill()
    runner.run(until(lambda: not any(map(is_running, pids)), 3.0))
