"""The tokenizer pool: the same ids as a direct call, and no job affects another."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_text import CHATML, SPECIAL, write_byte_tokenizer
from tokenizers import Tokenizer as TokenizerFile
from tokenizers import models, pre_tokenizers

from specserve.hub import resolve
from specserve.process.tokenizer_pool import TokenizerPool, TokenizerUnavailable
from specserve.text import Tokenizer, TokenizerError
from specserve.types import RequestError

# The content of a message selects what the template does: loop, or use memory or time.
_LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
_EAT = (
    "{% set ns = namespace(x='x' * 999) %}"
    "{% for i in range(20) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
)
_WORK = "{% for i in range(m.content.split()[1] | int) %}{% endfor %}"
TEMPLATE = (
    "{% for m in messages %}"
    f"{{% if m.content == 'loop' %}}{_LOOP}{{% elif m.content == 'eat' %}}{_EAT}"
    f"{{% elif m.content.startswith('work ') %}}{_WORK}{{% endif %}}"
    f"{{% endfor %}}{CHATML}"
)
HI = [{"role": "user", "content": "hi"}]
LOOP = [{"role": "user", "content": "loop"}]
EAT = [{"role": "user", "content": "eat"}]

pieces = st.sampled_from([*SPECIAL, "<|im_", "end|>", "\ud800", "é", "日本", "😀", " \n", "a"])
texts = st.text() | st.lists(pieces | st.text(max_size=3), max_size=12).map("".join)
chats = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool", "?"]),
            "content": texts
            | st.none()
            | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts})),
        },
        optional={"name": texts, "tool_calls": st.none(), "x": st.none() | st.integers()},
    ),
    max_size=4,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("text"), TEMPLATE)


@contextlib.asynccontextmanager
async def running_pool(directory: Path, **options: Any) -> Any:
    pool = TokenizerPool(directory, **options)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.stop()


async def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def both(directory: Path) -> Iterator[Callable[..., Any]]:
    """both(method, *args): the result of the pool and of a direct call."""
    direct, pool = Tokenizer(directory), TokenizerPool(directory)
    with asyncio.Runner() as runner:
        runner.run(pool.start())

        def ask(method: str, *args: Any, **options: Any) -> tuple[Any, Any]:
            outcomes: list[Any] = []
            for call in (
                lambda: runner.run(getattr(pool, method)(*args, **options)),
                lambda: tuple(getattr(direct, method)(*args, **options)),
            ):
                try:
                    outcomes.append(call())
                except RequestError as error:
                    outcomes.append((error.param, error.message))
            return outcomes[0], outcomes[1]

        yield ask
        runner.run(pool.stop())


@settings(deadline=None)
@given(text=texts, add_special=st.booleans())
def test_encode_returns_the_ids_of_the_tokenizer(
    both: Callable[..., Any], text: str, add_special: bool
) -> None:
    ours, direct = both("encode", text, add_special=add_special)
    assert ours == direct


@settings(deadline=None)
@given(messages=chats, generate=st.booleans(), proceed=st.booleans())
def test_chat_returns_the_ids_of_the_tokenizer(
    both: Callable[..., Any], messages: list[Any], generate: bool, proceed: bool
) -> None:
    options = {"add_generation_prompt": generate, "continue_final_message": proceed}
    ours, direct = both("chat", messages, **options)
    assert ours == direct


@pytest.mark.slow
def test_the_tokenizer_of_a_real_model() -> None:
    directory = resolve("smollm2-135m")

    async def run() -> None:
        direct = Tokenizer(directory)
        async with running_pool(directory) as pool:
            for text in ("Hello, world!", "你好 😀 naïve <|im_end|>", "def f():\n    pass\n" * 999):
                assert await pool.encode(text) == tuple(direct.encode(text))
                chat = [{"role": "user", "content": text}]
                assert await pool.chat(chat) == tuple(direct.chat(chat))
            with pytest.raises(RequestError, match="context of 10 tokens"):
                await pool.encode("x" * 2000, max_tokens=10)

    asyncio.run(run())


def test_a_template_that_never_ends_is_killed(directory: Path) -> None:
    """Jobs beside it and after it are answered."""

    async def run() -> None:
        async with running_pool(directory, time_limit=0.5) as pool:
            expected = await pool.chat(HI)
            await wait_until(lambda: len(pool.pids) == 2)
            started = time.monotonic()
            loop = asyncio.create_task(pool.chat(LOOP))
            await asyncio.sleep(0.05)
            assert await pool.chat(HI) == expected
            assert not loop.done()
            with pytest.raises(RequestError, match=r"^messages: .* than 0\.5 s of processor time"):
                await loop
            assert 0.4 < time.monotonic() - started < 5
            loops = [pool.chat(LOOP) for _ in range(2)]
            answers = await asyncio.gather(*loops, pool.chat(HI), return_exceptions=True)
            assert [type(answer) for answer in answers] == [RequestError, RequestError, tuple]
            assert answers[2] == expected

    asyncio.run(run())


def test_the_time_limit_does_not_include_waiting(directory: Path) -> None:
    """Together the jobs take longer than the limit, but none does so alone."""
    direct = Tokenizer(directory)
    size, elapsed = 1, 0.0
    while elapsed < 0.2:
        size *= 2
        work = [{"role": "user", "content": f"work {min(size, 99999)}"}] * max(1, size // 99999)
        started = time.perf_counter()
        direct.chat(work)
        elapsed = time.perf_counter() - started

    async def run() -> None:
        async with running_pool(directory, time_limit=3 * elapsed, workers=1) as pool:
            started = time.monotonic()
            answers = await asyncio.gather(*(pool.chat(work) for _ in range(12)))
            assert set(answers) == {tuple(direct.chat(work))}
            assert time.monotonic() - started > 3 * elapsed

    asyncio.run(run())


def test_the_time_limit_is_one_of_processor_time(directory: Path) -> None:
    """A busy machine does not make a job fail: here its process stands still for a while."""

    async def run() -> None:
        async with running_pool(directory, time_limit=0.5, workers=1) as pool:
            work = [{"role": "user", "content": "work 99999"}] * 50
            job = asyncio.create_task(pool.chat(work))
            await asyncio.sleep(0.02)
            (pid,) = pool.pids
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(1.5)
            assert not job.done()
            os.kill(pid, signal.SIGCONT)
            assert len(await job) > 0
            assert pool.pids == [pid]

    asyncio.run(run())


def test_a_process_that_gets_no_processor_time_is_replaced(directory: Path) -> None:
    """That is no fault of the request: it may be sent again."""

    async def run() -> None:
        async with running_pool(directory, time_limit=0.1, workers=1) as pool:
            expected = await pool.chat(HI)
            (pid,) = pool.pids
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(TokenizerUnavailable, match=r"no result after 2 s; .* overloaded"):
                await pool.chat(HI)
            assert await pool.chat(HI) == expected
            assert pool.pids != [pid]

    asyncio.run(run())


def test_a_template_that_needs_too_much_memory(directory: Path) -> None:
    async def run() -> None:
        async with running_pool(directory, memory_limit=2**28) as pool:
            await pool.chat(HI)
            pids = pool.pids
            with pytest.raises(RequestError, match=r"^messages: .*\(MemoryError\)"):
                await pool.chat(EAT)
            assert len(await pool.chat(HI)) > 0
            assert set(pids) <= set(pool.pids)  # no process was killed

    asyncio.run(run())


def test_a_text_that_needs_too_much_memory(directory: Path) -> None:
    """The library aborts the process; this is not taken for a crash, and the job is not retried."""

    async def run() -> None:
        async with running_pool(directory, memory_limit=2**25) as pool:
            with pytest.raises(RequestError, match=r"^prompt: .*too much memory"):
                await pool.encode("many words " * 2**18)
            assert len(await pool.encode("few words")) == 10

    asyncio.run(run())


def test_a_killed_process_is_replaced(directory: Path) -> None:
    async def run() -> None:
        async with running_pool(directory) as pool:
            expected = await pool.chat(HI)
            await wait_until(lambda: len(pool.pids) == 2)
            for pid in (killed := pool.pids):
                os.kill(pid, signal.SIGKILL)
            assert await pool.chat(HI) == expected
            await wait_until(lambda: len(pool.pids) == 2)
            assert not set(killed) & set(pool.pids)
            assert not any(map(is_running, killed))

    asyncio.run(run())


def test_a_job_whose_process_is_killed_is_retried_once(directory: Path) -> None:
    async def run() -> None:
        async with running_pool(directory, workers=1, time_limit=60) as pool:
            job = asyncio.create_task(pool.chat(LOOP))
            killed: set[int] = set()
            for _ in range(2):
                await wait_until(lambda: bool(set(pool.pids) - killed))
                await asyncio.sleep(0.1)
                assert not job.done()
                (pid,) = set(pool.pids) - killed
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            with pytest.raises(TokenizerUnavailable, match="failed 2 times") as error:
                await job
            assert error.value.retry_after > 0
            assert len(await pool.chat(HI)) > 0

    asyncio.run(run())


def _event_loops() -> list[Any]:
    with contextlib.suppress(ImportError):
        import uvloop

        return [asyncio.new_event_loop, uvloop.new_event_loop]
    return [asyncio.new_event_loop]


@pytest.mark.parametrize("new_loop", _event_loops()[-1:])
def test_the_event_loop_runs_while_text_is_encoded(directory: Path, new_loop: Any) -> None:
    async def run() -> None:
        async with running_pool(directory, time_limit=60) as pool:
            text = "hello wide world " * (2**22 // 17)
            job = asyncio.create_task(pool.encode(text))
            last, gaps = time.monotonic(), []
            while not job.done():
                await asyncio.sleep(0.001)
                gaps.append(time.monotonic() - last)
                last += gaps[-1]
            assert len(job.result()) == len(text) + 1
            # Copying the ids is one gap; tokenizing is several times that.
            gaps.sort()
            assert sum(gaps[:-3]) > 0.5 * sum(gaps)
            assert gaps[-1] < 1
            assert len(gaps) > 200

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


def test_a_text_that_cannot_fit_the_context_is_refused_at_once(directory: Path) -> None:
    async def run() -> None:
        async with running_pool(directory) as pool:
            most = Tokenizer(directory).max_token_bytes() or 0
            text = "é" * (most * 50)  # twice as many bytes
            with pytest.raises(RequestError) as error:
                await pool.encode(text, param="prediction", max_tokens=99)
            assert error.value.param == "prediction"
            assert error.value.message == (
                f"{len(text.encode())} bytes cannot fit the context of 99 tokens"
            )
            assert len(await pool.encode(text, max_tokens=100)) > 100  # the caller refuses it
            halves = [{"role": "user", "content": text[::2]}] * 2
            with pytest.raises(RequestError, match=r"messages: .*context of 99 tokens"):
                await pool.chat(halves, max_tokens=99)
            with pytest.raises(RequestError, match=r"at most 134217728 are allowed"):
                await pool.encode("x" * (2**27 + 1))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("job", "param"),
    [
        (lambda p: p.encode("ab\ud800", param="prediction"), "prediction"),
        (lambda p: p.chat([{"role": "user", "content": "\udfff"}]), "messages[0].content"),
        (lambda p: p.chat([{"role": "user", "content": [{}]}]), "messages[0].content[0].type"),
        (lambda p: p.chat(HI * 10**5), "messages"),
        (lambda p: p.chat(HI, continue_final_message=True), "continue_final_message"),
    ],
)
def test_errors_name_the_field(
    directory: Path, job: Callable[[TokenizerPool], Coroutine[Any, Any, Any]], param: str
) -> None:
    async def run() -> None:
        async with running_pool(directory, workers=1) as pool:
            with pytest.raises(RequestError) as error:
                await job(pool)
            assert error.value.param == param

    asyncio.run(run())


def test_a_cancelled_job_is_not_started(directory: Path) -> None:
    """A waiting job is not started; the answer to a running one is dropped."""

    async def run() -> None:
        async with running_pool(directory, workers=1, time_limit=0.5) as pool:
            expected = await pool.chat(HI)
            jobs = [asyncio.create_task(pool.chat(LOOP)) for _ in range(20)]
            last = asyncio.create_task(pool.chat(HI))
            await asyncio.sleep(0.1)
            for job in jobs:
                job.cancel()
            started = time.monotonic()
            assert await last == expected
            assert time.monotonic() - started < 5  # only the first of the 20 was running

    asyncio.run(run())


def test_the_queue_is_bounded(directory: Path) -> None:
    async def run() -> None:
        async with running_pool(directory, workers=1, max_waiting=3, time_limit=0.3) as pool:
            jobs = [asyncio.create_task(pool.chat(LOOP)) for _ in range(4)]
            await asyncio.sleep(0)
            with pytest.raises(TokenizerUnavailable, match="too many"):
                await pool.chat(HI)
            await asyncio.gather(*jobs, return_exceptions=True)
            assert len(await pool.chat(HI)) > 0

    asyncio.run(run())


@pytest.mark.parametrize("new_loop", _event_loops())
def test_stop_ends_processes_tasks_and_files(directory: Path, new_loop: Any) -> None:
    async def run() -> None:
        async with running_pool(directory):
            pass  # what the loop itself opens is open now
        num_files = len(os.listdir("/proc/self/fd"))
        pool = TokenizerPool(directory)
        await pool.start()
        await wait_until(lambda: len(pool.pids) == 2)
        pids = pool.pids
        open_jobs = [asyncio.create_task(pool.chat(LOOP)) for _ in range(3)]
        await asyncio.sleep(0.1)
        await pool.stop()
        assert pool.pids == []
        assert not any(map(is_running, pids))
        for job in open_jobs:
            with pytest.raises(TokenizerUnavailable, match="stopping"):
                await job
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert len(os.listdir("/proc/self/fd")) == num_files
        with pytest.raises(TokenizerUnavailable, match="not running"):
            await pool.encode("x")
        await pool.stop()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


def test_start_raises_for_unusable_files(tmp_path: Path) -> None:
    async def run() -> None:
        num_files = len(os.listdir("/proc/self/fd"))
        pool = TokenizerPool(tmp_path)
        with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
            await pool.start()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert len(os.listdir("/proc/self/fd")) == num_files
        await pool.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", r"cannot be compiled \(Expected"),
        ("{{ " + "(" * 5000, r"cannot be compiled \(it is nested too deeply\)"),
        (
            _LOOP,
            r"too much time or memory to compile.*more than 0\.5 s of processor time",
        ),
        # Running out of memory inside C code raises no exception.
        (
            "{% set n = 10 ** 4000 %}{{ n ** n ** n }}",
            r"more than 0\.5 s of processor time",
        ),
    ],
)
def test_start_raises_for_templates_that_cannot_be_compiled(
    tmp_path: Path, template: str, message: str
) -> None:
    write_byte_tokenizer(tmp_path, template)

    async def run() -> None:
        pool = TokenizerPool(tmp_path, compile_limit=0.5)
        with pytest.raises(TokenizerError, match=message) as error:
            await pool.start()
        assert str(error.value).startswith(str(tmp_path))
        assert "\n" not in str(error.value)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_a_template_whose_constants_need_too_much_memory(tmp_path: Path) -> None:
    """Constants are computed when a chat is rendered, so prompts are served."""
    write_byte_tokenizer(tmp_path, "{% set x = 'x' * 9999999999 %}" + CHATML)

    async def run() -> None:
        async with running_pool(tmp_path, memory_limit=2**28) as pool:
            assert len(await pool.encode("hi")) == 3
            with pytest.raises(RequestError, match=r"^messages: .*\(MemoryError\)"):
                await pool.chat(HI)

    asyncio.run(run())


def test_a_cancelled_start_leaves_no_task(directory: Path) -> None:
    async def run() -> None:
        for delay in (0.0, 0.02, 0.1):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(delay):
                    await TokenizerPool(directory).start()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_a_process_starts_again_when_missing_files_return(tmp_path: Path) -> None:
    async def run() -> None:
        file = write_byte_tokenizer(tmp_path, TEMPLATE) / "tokenizer.json"
        async with running_pool(tmp_path, workers=1) as pool:
            (pid,) = pool.pids
            file.rename(tmp_path / "away")
            os.kill(pid, signal.SIGKILL)
            await wait_until(lambda: pool.pids == [])
            with pytest.raises(TokenizerUnavailable, match="cannot be loaded at the moment"):
                await pool.encode("x")
            (tmp_path / "away").rename(file)
            await wait_until(lambda: pool.pids != [])
            assert len(await pool.encode("x")) == 2

    asyncio.run(run())


_PARENT = """
import asyncio, sys
from pathlib import Path
from specserve.process.tokenizer_pool import TokenizerPool

async def run():
    pool = TokenizerPool(Path(sys.argv[1]), time_limit=1.0)
    await pool.start()
    while len(pool.pids) < 2:
        await asyncio.sleep(0.01)
    job = asyncio.create_task(pool.chat([{"role": "user", "content": "loop"}]))
    await asyncio.sleep(0.1)
    print(*pool.pids, flush=True)
    await job

asyncio.run(run())
"""


def test_processes_do_not_outlive_their_parent(directory: Path) -> None:
    """Neither the idle one nor the one in a loop, which its own time limit ends."""
    command = [sys.executable, "-c", _PARENT, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_imports_no_torch() -> None:
    program = "import sys, specserve.process.tokenizer_main; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout == "False\n", answer.stderr


def test_text_without_tokens_does_not_end_a_process(tmp_path: Path) -> None:
    """For example with a vocabulary of words that lacks its unknown token."""
    model = models.WordLevel({"known": 0, "word": 1}, unk_token="[UNK]")
    file = TokenizerFile(model)
    file.pre_tokenizer = pre_tokenizers.Whitespace()
    file.save(str(tmp_path / "tokenizer.json"))
    config = {"chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    async def body() -> None:
        async with running_pool(tmp_path) as pool:
            await wait_until(lambda: len(pool.pids) == 2)
            pids = pool.pids
            for ask, param in (
                (pool.encode("an unheard word"), "prompt"),
                (pool.encode("unheard", param="prediction"), "prediction"),
                (pool.chat(HI), "messages"),
            ):
                with pytest.raises(RequestError, match="has no tokens for it") as error:
                    await ask
                assert error.value.param == param
            assert await pool.encode("known word") == (0, 1)
            assert pool.pids == pids

    asyncio.run(body())
