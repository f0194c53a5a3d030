"""The messages between the HTTP process and a tokenizer process. Imports no torch.

To the tokenizer process: `Setup` once, then one job at a time, the next one after the answer. From
it: each `Stage` of its start, `Ready` (or `Failed`, after which it ends), then one `Result` or
`Refused` per job.
"""

from typing import Any, Final

import msgspec
from msgspec import Struct

from specserve.engine.limits import Limits
from specserve.text.chat_messages import PlainMessage, other_fields

LONG_JOB: Final = 2**16  # bytes from which a job is long: other jobs should not wait for it


class Setup(Struct, frozen=True, tag=True):
    directory: str  # model directory
    time_limit: float  # seconds of processor time for one job
    memory_limit: int  # bytes for one job
    compile_limit: float  # seconds of processor time to compile the chat template


class Encode(Struct, frozen=True, tag=True):
    """`Tokenizer.encode` of the text in the request field `param`."""

    text: str
    add_special: bool
    param: str

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())


class Chat(Struct, frozen=True, tag=True):
    """`Tokenizer.chat` of these messages."""

    messages: tuple[PlainMessage, ...]
    add_generation_prompt: bool
    continue_final_message: bool
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: dict[str, Any] = {}
    param: str = "messages"

    @property
    def num_bytes(self) -> int:
        """Bytes of the contents, and of tools, tool calls and variables as JSON."""
        size = sum(len(message["content"].encode()) for message in self.messages)
        others = [fields for each in self.messages if (fields := other_fields(each))]
        if others or self.tools or self.template_kwargs:
            size += len(msgspec.json.encode((others, self.tools, self.template_kwargs)))
        return size


class Stage(Struct, frozen=True, tag=True):
    """A stage of the start begins. After `time_limit` s of processor time it fails: `problem`."""

    time_limit: float
    problem: str


class Call(Struct, frozen=True, tag=True):
    """Run the handler `name` of the process's module on the body of a request."""

    name: str
    body: bytes
    limits: Limits
    param: str = "body"

    @property
    def num_bytes(self) -> int:
        return len(self.body)


class Ready(Struct, frozen=True, tag=True):
    max_token_bytes: int | None  # see `Tokenizer.max_token_bytes`


class Failed(Struct, frozen=True, tag=True):
    """The model directory has no usable tokenizer (`TokenizerError`)."""

    error: str


class Result(Struct, frozen=True, tag=True):
    """Token ids, or the bytes that a handler returned."""

    value: tuple[int, ...] | bytes


class Refused(Struct, frozen=True, tag=True):
    """A job that can never be done as it is (`RequestError`)."""

    param: str
    message: str


TokenizerJob = Encode | Chat | Call
ToTokenizer = Setup | TokenizerJob
FromTokenizer = Stage | Ready | Failed | Result | Refused
