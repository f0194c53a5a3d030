"""Tokenising in workers: the same ids as directly, and no job that harms another."""

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
from specserve.process.text_process import TextProcess, TextUnavailable
from specserve.text import TextError, Tokenizer
from specserve.types import RequestError

# What a message says is what the template does: no time limit or memory is safe from it.
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
async def _started(directory: Path, **options: Any) -> Any:
    process = TextProcess(directory, **options)
    await process.start()
    try:
        yield process
    finally:
        await process.stop()


async def _until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def both(directory: Path) -> Iterator[Callable[..., Any]]:
    """both(method, *args): what a worker answers and what the tokenizer says itself."""
    direct, process = Tokenizer(directory), TextProcess(directory)
    with asyncio.Runner() as runner:
        runner.run(process.start())

        def ask(method: str, *args: Any, **options: Any) -> tuple[Any, Any]:
            outcomes: list[Any] = []
            for call in (
                lambda: runner.run(getattr(process, method)(*args, **options)),
                lambda: tuple(getattr(direct, method)(*args, **options)),
            ):
                try:
                    outcomes.append(call())
                except RequestError as error:
                    outcomes.append((error.param, error.message))
            return outcomes[0], outcomes[1]

        yield ask
        runner.run(process.stop())


@settings(deadline=None)
@given(text=texts, allow_special=st.booleans())
def test_prompts_have_the_ids_of_the_tokenizer(
    both: Callable[..., Any], text: str, allow_special: bool
) -> None:
    ours, direct = both("encode", text, allow_special=allow_special)
    assert ours == direct


@settings(deadline=None)
@given(messages=chats, generate=st.booleans(), proceed=st.booleans())
def test_chats_have_the_ids_of_the_tokenizer(
    both: Callable[..., Any], messages: list[Any], generate: bool, proceed: bool
) -> None:
    options = {"add_generation_prompt": generate, "continue_final_message": proceed}
    ours, direct = both("chat", messages, **options)
    assert ours == direct


@pytest.mark.slow
def test_the_real_tokenizer() -> None:
    directory = resolve("smollm2-135m")

    async def run() -> None:
        direct = Tokenizer(directory)
        async with _started(directory) as process:
            for text in ("Hello, world!", "你好 😀 naïve <|im_end|>", "def f():\n    pass\n" * 999):
                assert await process.encode(text) == tuple(direct.encode(text))
                chat = [{"role": "user", "content": text}]
                assert await process.chat(chat) == tuple(direct.chat(chat))
            with pytest.raises(RequestError, match="context of 10 tokens"):
                await process.encode("x" * 2000, max_tokens=10)

    asyncio.run(run())


def test_a_template_that_never_ends(directory: Path) -> None:
    """It is killed; what runs beside it and what comes after it is answered."""

    async def run() -> None:
        async with _started(directory, time_limit=0.5) as process:
            expected = await process.chat(HI)
            await _until(lambda: len(process.pids) == 2)
            started = time.monotonic()
            loop = asyncio.create_task(process.chat(LOOP))
            await asyncio.sleep(0.05)
            assert await process.chat(HI) == expected
            assert not loop.done()
            with pytest.raises(RequestError, match=r"^messages: .* took longer than 0\.5 s"):
                await loop
            assert 0.4 < time.monotonic() - started < 5
            loops = [process.chat(LOOP) for _ in range(2)]
            answers = await asyncio.gather(*loops, process.chat(HI), return_exceptions=True)
            assert [type(answer) for answer in answers] == [RequestError, RequestError, tuple]
            assert answers[2] == expected

    asyncio.run(run())


def test_waiting_for_a_worker_is_no_work(directory: Path) -> None:
    """Together the jobs take longer than the limit, each by itself does not."""
    direct = Tokenizer(directory)
    size, elapsed = 1, 0.0
    while elapsed < 0.2:
        size *= 2
        work = [{"role": "user", "content": f"work {min(size, 99999)}"}] * max(1, size // 99999)
        started = time.perf_counter()
        direct.chat(work)
        elapsed = time.perf_counter() - started

    async def run() -> None:
        async with _started(directory, time_limit=3 * elapsed, workers=1) as process:
            started = time.monotonic()
            answers = await asyncio.gather(*(process.chat(work) for _ in range(12)))
            assert set(answers) == {tuple(direct.chat(work))}
            assert time.monotonic() - started > 3 * elapsed

    asyncio.run(run())


def test_a_template_that_eats_memory(directory: Path) -> None:
    async def run() -> None:
        async with _started(directory, memory_limit=2**28) as process:
            await process.chat(HI)
            pids = process.pids
            with pytest.raises(RequestError, match=r"^messages: .*\(MemoryError\)"):
                await process.chat(EAT)
            assert len(await process.chat(HI)) > 0
            assert set(pids) <= set(process.pids)  # nothing had to be killed

    asyncio.run(run())


def test_text_that_needs_too_much_memory(directory: Path) -> None:
    """The library ends its process then: it is told from a crash, and not tried again."""

    async def run() -> None:
        async with _started(directory, memory_limit=2**25) as process:
            with pytest.raises(RequestError, match=r"^prompt: .*more memory"):
                await process.encode("many words " * 2**18)
            assert len(await process.encode("few words")) == 10

    asyncio.run(run())


def test_a_killed_worker_is_replaced(directory: Path) -> None:
    async def run() -> None:
        async with _started(directory) as process:
            expected = await process.chat(HI)
            await _until(lambda: len(process.pids) == 2)
            for pid in (killed := process.pids):
                os.kill(pid, signal.SIGKILL)
            assert await process.chat(HI) == expected
            await _until(lambda: len(process.pids) == 2)
            assert not set(killed) & set(process.pids)
            assert not any(map(_runs, killed))

    asyncio.run(run())


def test_a_job_whose_worker_is_killed_is_tried_once_more(directory: Path) -> None:
    async def run() -> None:
        async with _started(directory, workers=1, time_limit=60) as process:
            job = asyncio.create_task(process.chat(LOOP))
            killed: set[int] = set()
            for _ in range(2):
                await _until(lambda: bool(set(process.pids) - killed))
                await asyncio.sleep(0.1)
                assert not job.done()
                (pid,) = set(process.pids) - killed
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            with pytest.raises(TextUnavailable, match="failed 2 times") as error:
                await job
            assert error.value.retry_after > 0
            assert len(await process.chat(HI)) > 0

    asyncio.run(run())


def _event_loops() -> list[Any]:
    with contextlib.suppress(ImportError):
        import uvloop

        return [asyncio.new_event_loop, uvloop.new_event_loop]
    return [asyncio.new_event_loop]


@pytest.mark.parametrize("new_loop", _event_loops()[-1:])
def test_the_loop_goes_on_while_text_is_encoded(directory: Path, new_loop: Any) -> None:
    async def run() -> None:
        async with _started(directory, time_limit=60) as process:
            text = "hello wide world " * (2**22 // 17)
            job = asyncio.create_task(process.encode(text))
            last, gaps = time.monotonic(), []
            while not job.done():
                await asyncio.sleep(0.001)
                gaps.append(time.monotonic() - last)
                last += gaps[-1]
            assert len(job.result()) == len(text) + 1
            # Copying the ids is one gap; tokenising is several times that.
            gaps.sort()
            assert sum(gaps[:-3]) > 0.5 * sum(gaps)
            assert gaps[-1] < 1
            assert len(gaps) > 200

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


def test_what_cannot_fit_is_refused_at_once(directory: Path) -> None:
    async def run() -> None:
        async with _started(directory) as process:
            most = Tokenizer(directory).max_token_bytes() or 0
            text = "é" * (most * 50)  # twice as many bytes
            with pytest.raises(RequestError) as error:
                await process.encode(text, param="prediction", max_tokens=99)
            assert error.value.param == "prediction"
            assert error.value.message == (
                f"{len(text.encode())} bytes cannot fit the context of 99 tokens"
            )
            assert len(await process.encode(text, max_tokens=100)) > 100  # for others to refuse
            halves = [{"role": "user", "content": text[::2]}] * 2
            with pytest.raises(RequestError, match=r"messages: .*context of 99 tokens"):
                await process.chat(halves, max_tokens=99)
            with pytest.raises(RequestError, match=r"at most 134217728 are allowed"):
                await process.encode("x" * (2**27 + 1))

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
def test_bad_input_is_named(
    directory: Path, job: Callable[[TextProcess], Coroutine[Any, Any, Any]], param: str
) -> None:
    async def run() -> None:
        async with _started(directory, workers=1) as process:
            with pytest.raises(RequestError) as error:
                await job(process)
            assert error.value.param == param

    asyncio.run(run())


def test_a_caller_that_leaves(directory: Path) -> None:
    """Its job is not started if it waits; if it runs, its answer is nobody's."""

    async def run() -> None:
        async with _started(directory, workers=1, time_limit=0.5) as process:
            expected = await process.chat(HI)
            jobs = [asyncio.create_task(process.chat(LOOP)) for _ in range(20)]
            last = asyncio.create_task(process.chat(HI))
            await asyncio.sleep(0.1)
            for job in jobs:
                job.cancel()
            started = time.monotonic()
            assert await last == expected
            assert time.monotonic() - started < 5  # of the 20 only the first was at work

    asyncio.run(run())


def test_the_queue_has_an_end(directory: Path) -> None:
    async def run() -> None:
        async with _started(directory, workers=1, max_waiting=3, time_limit=0.3) as process:
            jobs = [asyncio.create_task(process.chat(LOOP)) for _ in range(4)]
            await asyncio.sleep(0)
            with pytest.raises(TextUnavailable, match="too many"):
                await process.chat(HI)
            await asyncio.gather(*jobs, return_exceptions=True)
            assert len(await process.chat(HI)) > 0

    asyncio.run(run())


@pytest.mark.parametrize("new_loop", _event_loops())
def test_stop_leaves_nothing(directory: Path, new_loop: Any) -> None:
    async def run() -> None:
        async with _started(directory):
            pass  # what the loop itself opens is open now
        num_files = len(os.listdir("/proc/self/fd"))
        process = TextProcess(directory)
        await process.start()
        await _until(lambda: len(process.pids) == 2)
        pids = process.pids
        open_jobs = [asyncio.create_task(process.chat(LOOP)) for _ in range(3)]
        await asyncio.sleep(0.1)
        await process.stop()
        assert process.pids == []
        assert not any(map(_runs, pids))
        for job in open_jobs:
            with pytest.raises(TextUnavailable, match="stopping"):
                await job
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert len(os.listdir("/proc/self/fd")) == num_files
        with pytest.raises(TextUnavailable, match="not running"):
            await process.encode("x")
        await process.stop()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


def test_unusable_files_are_reported_by_start(tmp_path: Path) -> None:
    async def run() -> None:
        num_files = len(os.listdir("/proc/self/fd"))
        process = TextProcess(tmp_path)
        with pytest.raises(TextError, match=r"no tokenizer\.json"):
            await process.start()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert len(os.listdir("/proc/self/fd")) == num_files
        await process.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", r"cannot be compiled \(Expected"),
        ("{{ " + "(" * 5000, r"cannot be compiled \(it is nested too deeply\)"),
        (_LOOP, r"too much time or memory to compile.*\(after 0\.5 s\)$"),
        # A text worker's own memory ends in C, where no exception does.
        ("{% set n = 10 ** 4000 %}{{ n ** n ** n }}", r"\(after 0\.5 s\)$"),
    ],
)
def test_templates_that_cannot_be_compiled(tmp_path: Path, template: str, message: str) -> None:
    write_byte_tokenizer(tmp_path, template)

    async def run() -> None:
        process = TextProcess(tmp_path, compile_limit=0.5)
        with pytest.raises(TextError, match=message) as error:
            await process.start()
        assert str(error.value).startswith(str(tmp_path))
        assert "\n" not in str(error.value)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_a_template_that_eats_memory_before_any_chat(tmp_path: Path) -> None:
    """Its constants are made when it is rendered; prompts are served all the same."""
    write_byte_tokenizer(tmp_path, "{% set x = 'x' * 9999999999 %}" + CHATML)

    async def run() -> None:
        async with _started(tmp_path, memory_limit=2**28) as process:
            assert len(await process.encode("hi")) == 3
            with pytest.raises(RequestError, match=r"^messages: .*\(MemoryError\)"):
                await process.chat(HI)

    asyncio.run(run())


def test_a_start_that_is_cancelled(directory: Path) -> None:
    async def run() -> None:
        for delay in (0.0, 0.02, 0.1):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(delay):
                    await TextProcess(directory).start()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_files_that_are_gone_for_a_while(tmp_path: Path) -> None:
    async def run() -> None:
        file = write_byte_tokenizer(tmp_path, TEMPLATE) / "tokenizer.json"
        async with _started(tmp_path, workers=1) as process:
            (pid,) = process.pids
            file.rename(tmp_path / "away")
            os.kill(pid, signal.SIGKILL)
            await _until(lambda: process.pids == [])
            with pytest.raises(TextUnavailable, match="cannot be loaded at the moment"):
                await process.encode("x")
            (tmp_path / "away").rename(file)
            await _until(lambda: process.pids != [])
            assert len(await process.encode("x")) == 2

    asyncio.run(run())


_PARENT = """
import asyncio, sys
from pathlib import Path
from specserve.process.text_process import TextProcess

async def run():
    process = TextProcess(Path(sys.argv[1]), time_limit=1.0)
    await process.start()
    while len(process.pids) < 2:
        await asyncio.sleep(0.01)
    job = asyncio.create_task(process.chat([{"role": "user", "content": "loop"}]))
    await asyncio.sleep(0.1)
    print(*process.pids, flush=True)
    await job

asyncio.run(run())
"""


def test_workers_do_not_outlive_their_parent(directory: Path) -> None:
    """Not the idle one, and not the one in a loop: its own alarm ends it."""
    command = [sys.executable, "-c", _PARENT, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(map(_runs, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_imports_no_torch() -> None:
    program = "import sys, specserve.process.text_main; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout == "False\n", answer.stderr


def test_text_without_tokens_harms_no_worker(tmp_path: Path) -> None:
    """As with a vocabulary of words or pieces in which the one for all others is missing."""
    model = models.WordLevel({"known": 0, "word": 1}, unk_token="[UNK]")
    file = TokenizerFile(model)
    file.pre_tokenizer = pre_tokenizers.Whitespace()
    file.save(str(tmp_path / "tokenizer.json"))
    config = {"chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    async def body() -> None:
        async with _started(tmp_path) as texts:
            await _until(lambda: len(texts.pids) == 2)
            pids = texts.pids
            for ask, param in (
                (texts.encode("an unheard word"), "prompt"),
                (texts.encode("an unheard word", allow_special=True), "prompt"),
                (texts.encode("unheard", param="prediction"), "prediction"),
                (texts.chat(HI), "messages"),
            ):
                with pytest.raises(RequestError, match="has no tokens for it") as error:
                    await ask
                assert error.value.param == param
            assert await texts.encode("known word") == (0, 1)
            assert texts.pids == pids

    asyncio.run(body())
