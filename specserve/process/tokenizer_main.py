"""A tokenizer process: tokenizes texts and renders chats, one job at a time.

Run as `python -m specserve.process.tokenizer_main FD`; it ends when its peer closes the socket FD.
A chat template is a program, so that a job can take any time and memory: the process limits its own
processor time and memory.
"""

import contextlib
import gc
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from specserve.engine.limits import Limits
from specserve.process.frames import FrameSocket
from specserve.process.parent_death import set_parent_death_signal
from specserve.process.tokenizer_messages import (
    LONG_JOB,
    Call,
    Chat,
    Encode,
    Failed,
    Ready,
    Refused,
    Result,
    Setup,
    Stage,
    TokenizerJob,
    ToTokenizer,
)
from specserve.text import Tokenizer, TokenizerError
from specserve.types import RequestError

_LOAD_TIME: Final = 120.0  # seconds of processor time to load a tokenizer
_LOAD_MEMORY: Final = 2**31  # bytes beyond the memory limit while the tokenizer is loaded

# Linux's nice value of long jobs. Beside a thread of the engine, such a job gets a tenth of a
# processor instead of half.
_LONG_JOB_NICE: Final = 10

Handler = Callable[[Tokenizer, bytes, Limits], bytes]  # raises RequestError


def main(fd: int, handlers: Mapping[str, Handler]) -> None:
    """Serve the peer at the other end of the socket `fd`; `Call` messages name the `handlers`."""
    set_parent_death_signal()
    # One job at a time needs no threads, whose memory would use up much of the limit.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    peer: FrameSocket[ToTokenizer] = FrameSocket(socket.socket(fileno=fd), ToTokenizer)
    with contextlib.suppress(ConnectionError):  # the peer closed the socket
        _serve(peer, handlers)


def _serve(peer: FrameSocket[ToTokenizer], handlers: Mapping[str, Handler]) -> None:
    messages = _messages(peer)
    setup = next(messages, None)
    if not isinstance(setup, Setup):
        return
    try:
        tokenizer = _load(peer, setup)
    except TokenizerError as error:
        peer.send(Failed(str(error)))
        return
    gc.freeze()
    gc.enable()
    peer.send(Ready(tokenizer.max_token_bytes()))
    for job in messages:
        assert not isinstance(job, Setup)
        _limit_processor_time(setup.time_limit)
        run = _run if job.num_bytes < LONG_JOB else _run_at_low_priority
        answer = run(tokenizer, job, handlers)
        _limit_processor_time(0)
        peer.send(answer)


def _load(peer: FrameSocket[ToTokenizer], setup: Setup) -> Tokenizer:
    """Load a tokenizer and compile its chat template, in `Stage`s. Raises TokenizerError."""
    tokenizer = Tokenizer(Path(setup.directory))
    problem = (
        f"{setup.directory}: the chat template takes too much time or memory to compile; use the "
        f"model's original one, or remove it to serve plain prompts"
    )
    _start_stage(peer, Stage(setup.compile_limit, problem))
    _limit_memory(setup.memory_limit)
    tokenizer.compile_template()
    _limit_memory(setup.memory_limit + _LOAD_MEMORY)
    problem = f"{setup.directory}: the tokenizer was not loaded in time"
    _start_stage(peer, Stage(_LOAD_TIME, problem))
    tokenizer.prepare()
    _limit_memory(setup.memory_limit)
    _limit_processor_time(0)
    return tokenizer


def _start_stage(peer: FrameSocket[ToTokenizer], stage: Stage) -> None:
    _limit_processor_time(stage.time_limit)
    peer.send(stage)


def _limit_processor_time(seconds: float) -> None:
    """Have SIGPROF end this process after `seconds` more of processor time; 0: no limit.

    Its default action runs no Python, so that it ends a call of a library as well. Wall time would
    depend on what else the machine does.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _messages(peer: FrameSocket[ToTokenizer]) -> Iterator[ToTokenizer]:
    while (messages := peer.receive(None)) is not None:
        yield from messages


def _run(
    tokenizer: Tokenizer, job: TokenizerJob, handlers: Mapping[str, Handler]
) -> Result | Refused:
    try:
        match job:
            case Call(name, body, limits):
                return Result(handlers[name](tokenizer, body, limits))
            case Encode(text, add_special):
                ids = tokenizer.encode(text, add_special=add_special)
            case Chat(messages, generates, continues):
                tools, values = job.tools, job.template_kwargs
                ids = tokenizer.chat(
                    messages, generates, continues, tools=tools, template_kwargs=values
                )
    except RequestError as error:
        # `Tokenizer.encode` does not know the name of the field.
        return Refused(job.param if isinstance(job, Encode) else error.param, error.message)
    except MemoryError:
        return Refused(job.param, "it needs too much memory; send less")
    return Result(tuple(ids))


def _run_at_low_priority(
    tokenizer: Tokenizer, job: TokenizerJob, handlers: Mapping[str, Handler]
) -> Result | Refused:
    """`_run` with a lower priority for processor time, so that it slows the engine down less.

    In a thread of its own, because the priority of a thread cannot be raised again (Linux only).
    """
    answers: list[Result | Refused] = []

    def run() -> None:
        if sys.platform == "linux":  # elsewhere this would be the id of another process
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LONG_JOB_NICE)
        answers.append(_run(tokenizer, job, handlers))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return answers[0]


def _limit_memory(size: int) -> None:
    """Let the process map `size` bytes more than now (Linux only), and disable core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would contain users' texts
    statm = Path("/proc/self/statm")
    if statm.exists():
        limit = int(statm.read_text(encoding="utf-8").split()[0]) * resource.getpagesize() + size
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    main(int(sys.argv[1]), {})
