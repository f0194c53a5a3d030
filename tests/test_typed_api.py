"""The arguments of the Python API: typed, complete, described, and checked by mypy."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from specserve import LLM, AsyncClient, AsyncLLM, Client
from specserve.async_llm import RequestOptions
from specserve.client import Options
from specserve.config import ENGINE_DEFAULTS, ENGINE_SECTIONS, SECTION_TYPES, EngineSettings
from specserve.server.protocol.fields import GenerationFields

ROOT = Path(__file__).parent.parent
NO_OPTIONS = {"stream", "stream_options", "return_token_ids", "return_drafter_ids"}
NO_EFFECT = {"user", "safety_identifier", "prompt_cache_key", "service_tier", "metadata"}


def test_the_settings_are_the_fields_of_the_configuration() -> None:
    """`target` and `draft` are arguments of their own."""
    fields = {
        name: hint
        for section in ENGINE_SECTIONS
        for name, hint in get_type_hints(SECTION_TYPES[section]).items()
        if name not in ("target", "draft")
    }
    assert get_type_hints(EngineSettings) == fields
    assert fields.keys() == ENGINE_DEFAULTS.keys() - {"target", "draft"}


def test_the_options_of_the_clients_are_the_fields_of_the_requests() -> None:
    """The server calls the time limit `request_timeout`, and chats ask for `top_logprobs`."""
    fields = set(GenerationFields.__struct_fields__) - NO_OPTIONS - NO_EFFECT - {"request_timeout"}
    assert set(Options.__annotations__) == fields | {"logprobs", "timeout", "request_id", "extra"}


@pytest.mark.parametrize(
    ("function", "fields"),
    [
        *((LLM.__init__, EngineSettings), (AsyncLLM.__init__, EngineSettings)),
        *((AsyncLLM.generate, RequestOptions), (AsyncLLM.chat, RequestOptions)),
        (AsyncLLM.stream, RequestOptions),
        *(
            (getattr(kind, name), Options)
            for kind in (Client, AsyncClient)
            for name in ("complete", "chat", "stream", "stream_chat")
        ),
    ],
)
def test_help_lists_every_field_with_its_type_and_meaning(function: Any, fields: type) -> None:
    text = inspect.getdoc(function) or ""
    for name in get_type_hints(fields):
        entry = re.search(rf"^{name}: \w.*\n    \w.{{10}}", text, re.MULTILINE)
        assert entry is not None, name
    assert all(len(line) <= 100 for line in text.splitlines())


def test_help_has_defaults_and_units() -> None:
    text = inspect.getdoc(LLM.__init__) or ""
    assert "block_size: int = 16\n    tokens per KV block" in text
    assert "kv_memory: str | None = None\n" in text
    text = inspect.getdoc(Client.chat) or ""
    assert "\ntimeout: float\n    Seconds" in text
    assert "\nstop: str | Sequence[str]\n" in text


USES = """
from specserve import LLM, AsyncClient, AsyncLLM, Client, Delta, Generation, SamplingParams

params = SamplingParams(temperature=0.0)
chat = [{"role": "user", "content": "a"}]
parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
LLM(model="smollm2-135m")  # error: call-arg
LLM("smollm2-135m", draft=3)  # error: arg-type
LLM("smollm2-135m", kv_memory=2)  # error: arg-type
LLM("smollm2-135m", dtype="float8")  # error: arg-type
LLM("smollm2-135m", port=80)  # error: call-arg
AsyncLLM("smollm2-135m", max_num_seq=4)  # error: call-arg
with LLM("smollm2-135m", draft=["ngram"], kv_memory="1GiB", options={"ngram": {"x": 3}}) as llm:
    results: list[Generation] = llm.generate(["a", [1, 2], chat], params)
    llm.generate("a", [params])
    llm.generate("a", 0.7)  # error: arg-type
    llm.generate("a", temperature=0.7)  # error: call-arg
    llm.chat("a", params)
    llm.chat(chat)
    llm.chat([chat, parts, "a"])
    llm.chat([1, 2])  # error: list-item
    text: str = results[0].text
    for delta in llm.stream(parts, params):
        deltas: Delta = delta
        ids: tuple[int, ...] = delta.token_ids
        delta.tokens  # error: attr-defined
    llm.stream("a", n=2)  # error: call-arg


async def use() -> None:
    async with AsyncLLM("smollm2-135m", draft="none", max_num_seqs=4) as llm:
        texts: str = (await llm.generate("a", params, priority=1))[0].text
        await llm.chat(chat, timeout="1")  # error: arg-type
        async for delta in llm.stream("a", params, cache_salt="b"):
            ids: tuple[int, ...] = delta.token_ids
        for other in llm.stream("a"):  # error: attr-defined
            pass
    async with AsyncClient() as client:
        (await client.chat("a", temperature=0.5)).text
        await client.chat("a", temprature=0.5)  # error: call-arg


with Client() as client:
    client.chat(chat, max_tokens=5, stop=["a"], logit_bias={3: 1.0}).text
    client.chat(chat, max_tokens="5")  # error: arg-type
    client.complete("a", stop=3)  # error: arg-type
    client.stream("a", max_token=5)  # error: call-arg
"""


@pytest.mark.slow
def test_mypy_accepts_right_uses_and_rejects_wrong_ones(tmp_path: Path) -> None:
    """Right are also the examples of the README."""
    expected = {
        (0, number, code)
        for number, line in enumerate(USES.splitlines(), start=1)
        if "# error: " in line
        for code in line.partition("# error: ")[2].split(", ")
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    examples = [block for block in blocks if "from specserve import" in block]
    files = [tmp_path / f"uses_{number}.py" for number in range(1 + len(examples))]
    for file, program in zip(files, [USES, *examples], strict=True):
        file.write_text(program)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", *map(str, files)],
        cwd=ROOT,  # the settings of the project, and its cache
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(
        r"^\S*uses_(\d+).py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.MULTILINE
    )
    rejected = {(int(file), int(number), code) for file, number, code in found}
    assert rejected == expected, done.stdout + done.stderr
