"""What the HTTP process and a text worker say to each other. No torch.

To the worker: `Setup` once, then one job at a time, the next one after the answer. From it: each
`Stage` of its start, `Ready` (or `Failed`, and it is over), then one `Ids`, `Result` or `Refused`
per job.
"""

from msgspec import Struct

from specserve.engine.limits import Limits
from specserve.text.messages import PlainMessage


class Setup(Struct, frozen=True, tag=True):
    directory: str  # of the model
    time_limit: float  # seconds for one job
    memory_limit: int  # bytes for one job
    compile_limit: float  # seconds for the chat template


class Encode(Struct, frozen=True, tag=True):
    """`Tokenizer.encode` of the field `param`."""

    text: str
    allow_special: bool
    add_special: bool
    param: str


class Chat(Struct, frozen=True, tag=True):
    """`Tokenizer.chat`."""

    messages: tuple[PlainMessage, ...]
    add_generation_prompt: bool
    continue_final_message: bool
    param: str = "messages"


class Stage(Struct, frozen=True, tag=True):
    """What comes next takes `time_limit` seconds at most; `problem` says what it means if not."""

    time_limit: float
    problem: str


class Call(Struct, frozen=True, tag=True):
    """Run the worker's handler of this name on the body of a request."""

    name: str
    body: bytes
    limits: Limits
    param: str = "body"


class Ready(Struct, frozen=True, tag=True):
    max_token_bytes: int | None  # of the tokenizer


class Failed(Struct, frozen=True, tag=True):
    """The model directory has no usable tokenizer (`TextError`)."""

    error: str


class Ids(Struct, frozen=True, tag=True):
    ids: tuple[int, ...]


class Result(Struct, frozen=True, tag=True):
    """What a handler returned."""

    data: bytes


class Refused(Struct, frozen=True, tag=True):
    """A job that cannot be done as asked (`RequestError`)."""

    param: str
    message: str


Job = Encode | Chat | Call
ToText = Setup | Job
FromText = Stage | Ready | Failed | Ids | Result | Refused
