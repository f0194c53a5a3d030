"""Error messages about a wrong field have the field, its value and what is expected."""

import msgspec
import pytest

from specserve.server.parse import decode
from specserve.server.protocol.completions import CompletionRequest
from specserve.types import RequestError

CASES = [
    ({"temperature": 9}, "temperature: expected float <= 2.0, got 9"),
    ({"temperature": "hot"}, 'temperature: expected float, got "hot"'),
    ({"stream": 1}, "stream: expected bool, got 1"),
    ({"n": True}, "n: expected int, got true"),
    ({"stop": ["a", ""]}, "stop[1]: expected str of length >= 1, got 0"),
    ({"stop": ["a"] * 17}, "stop: expected array of length <= 16, got 17"),
    ({"stop": {}}, "stop: expected str | array, got object"),
    ({"user": "x" * 300}, "user: expected str of length <= 256, got 300"),
    ({"n": "x" * 300}, f'n: expected int, got "{"x" * 40}..."'),
    ({"logit_bias": {"5": 101}}, "logit_bias: expected float <= 100.0"),
    ({"temperatur": 1}, "temperatur: unknown field; did you mean 'temperature'?"),
    (
        {"speculation": {"max_node": 1}},
        "speculation.max_node: unknown field; did you mean 'max_nodes'?",
    ),
    ({"speculation": {"depth": 1}}, "speculation.depth: unknown field; remove it"),
    (
        {"prediction": {"type": "text", "content": ""}},
        "prediction.type: invalid enum value 'text'; use 'content'",
    ),
    (
        {"prediction": {"type": "content", "content": [{"type": "text", "txt": "a"}]}},
        "prediction.content[0].txt: unknown field; did you mean 'text'?",
    ),
    ({"prediction": {"type": "content"}}, "prediction.content: required, but missing"),
    ({"service_tier": "flex"}, "service_tier: invalid enum value 'flex'; use 'auto' or 'default'"),
]


@pytest.mark.parametrize(("fields", "message"), CASES, ids=lambda value: str(value)[:40])
def test_errors_quote_field_and_value(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as error:
        decode(msgspec.json.encode({"prompt": "x", **fields}), CompletionRequest)
    assert str(error.value) == message
