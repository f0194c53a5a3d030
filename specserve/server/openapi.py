"""The OpenAPI 3.1 description of the API, generated from the Structs in `protocol/`.

The texts about fields are in `descriptions.py`.
"""

from functools import cache
from itertools import chain
from typing import Any, Final

import msgspec
from msgspec import Struct

from specserve import __version__
from specserve.server.descriptions import DESCRIPTIONS
from specserve.server.protocol import others
from specserve.server.protocol.chat import (
    MESSAGE_SCHEMA,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
)
from specserve.server.protocol.completions import Completion, CompletionRequest
from specserve.server.protocol.fields import GenerationFields

_REF: Final = "#/components/schemas/{name}"
_JSON: Final = "application/json"
# The routes, with the types of request and answer, and what they do.
_POST: Final[dict[str, tuple[type[Struct], type[Struct], str]]] = {
    "/v1/chat/completions": (ChatRequest, ChatCompletion, "Answer a chat"),
    "/v1/completions": (CompletionRequest, Completion, "Continue texts or token ids"),
    "/tokenize": (
        others.TokenizeRequest,
        others.TokenizeResponse,
        "Convert a text or a chat to token ids",
    ),
    "/detokenize": (others.DetokenizeRequest, others.DetokenizeResponse, "Convert ids to text"),
}
_GET: Final[dict[str, tuple[type[Struct], str]]] = {
    "/v1/models": (others.ModelList, "List the model"),
    "/v1/models/{model}": (others.Model, "Show the model"),
    "/health": (others.Health, "Whether the server is alive; 503 if its engine cannot be started"),
    "/ready": (others.Readiness, "Whether a request would be accepted now; 503 if not"),
    "/version": (others.Version, "Show the version"),
    "/v1/speculation": (others.SpeculationReport, "Show totals of speculative decoding"),
}
_EXAMPLES: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": 60,
    },
    "/v1/completions": {"prompt": "The sky is", "max_tokens": 20, "temperature": 0},
    "/tokenize": {"prompt": "The sky is"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
_CHUNKS: Final[dict[type[Struct], type[Struct]]] = {  # of the streams, by type of request
    ChatRequest: ChatChunk,
    CompletionRequest: Completion,
}
_PUBLIC: Final = {"/health", "/ready", "/version"}
_GET_ERRORS: Final = (400, 401, 403, 503)
_POST_ERRORS: Final = (*_GET_ERRORS, 404, 408, 413, 415, 429, 500, 504)
_ERRORS: Final = {
    400: "The request is malformed, or the field that `param` names is wrong",
    401: "No known API key is given",
    403: "The API key lacks the scope that this route needs",
    404: "There is no such model",
    408: "The body is late, or the request's own deadline has passed",
    413: "The body is too large",
    415: "The body is not plain JSON in UTF-8",
    429: "A queue is full; the header Retry-After says when to try again",
    500: "The engine failed on this request",
    503: "The server is starting, restarting, shutting down or overloaded; see Retry-After",
    504: "The server's deadline for a request has passed",
}


@cache
def openapi() -> dict[str, Any]:
    """The document; made when it is asked for first."""
    structs: list[type[Struct]] = [answer for answer, _ in _GET.values()]
    structs += chain.from_iterable((body, answer) for body, answer, _ in _POST.values())
    structs += [*_CHUNKS.values(), others.ErrorResponse]
    schemas = msgspec.json.schema_components(structs, ref_template=_REF)[1]
    metrics = _content("text/plain", {"type": "string"}, "Prometheus' text format or OpenMetrics")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "specserve",
            "version": __version__,
            "description": "Language models served with speculative decoding, as OpenAI's API. "
            "Options that OpenAI's API lacks are further fields of the request.",
        },
        "paths": {
            **{path: {"post": _post(path, *each)} for path, each in _POST.items()},
            **{path: {"get": _get(path, *each)} for path, each in _GET.items()},
            "/metrics": {"get": {"summary": "Show metrics", "responses": {"200": metrics}}},
        },
        "components": {
            "schemas": _with_descriptions({**schemas, "Message": MESSAGE_SCHEMA}),
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The API key, if the server has any: Authorization: Bearer KEY",
                }
            },
        },
        "security": [{"key": []}, {}],
    }


def _with_descriptions(schema: Any) -> Any:
    """`schema` with a description of every field. Raises KeyError for a field without a text."""
    if isinstance(schema, list):
        return [_with_descriptions(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: _with_descriptions(each) for name, each in schema.items()}
    for name, field in schema.get("properties", {}).items():
        text = DESCRIPTIONS.get(f"{schema['title']}.{name}") or DESCRIPTIONS[name]
        schema["properties"][name] = {"description": text, **field}
    return schema


def _post(path: str, body: type[Struct], answer: type[Struct], summary: str) -> dict[str, Any]:
    success = _json(answer)
    if issubclass(body, GenerationFields):
        success["content"]["text/event-stream"] = {}
        success["description"] = (
            "The answer. With `stream`: server-sent events, each of which holds a "
            f"{_CHUNKS[body].__name__} or, at an error, an ErrorResponse; the last is [DONE]"
        )
    schema = _json(body)["content"][_JSON]["schema"]
    content = {_JSON: {"schema": schema, "example": _EXAMPLES[path]}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": content},
        "responses": {"200": success, **_errors(_POST_ERRORS)},
    }


def _get(path: str, answer: type[Struct], summary: str) -> dict[str, Any]:
    success = _json(answer)
    if path in _PUBLIC:
        return {"summary": summary, "security": [], "responses": {"200": success, "503": success}}
    responses = {"200": success, **_errors(_GET_ERRORS)}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if "{model}" in path:
        operation["parameters"] = [
            {
                "name": "model",
                "in": "path",
                "required": True,
                "description": "Name of the model, as /v1/models lists it.",
                "schema": {"type": "string"},
            }
        ]
        operation["responses"] |= _errors((404,))
    return operation


def _json(struct: type[Struct], description: str = "The answer") -> dict[str, Any]:
    return _content(_JSON, {"$ref": _REF.format(name=struct.__name__)}, description)


def _content(kind: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": schema}}}


def _errors(statuses: tuple[int, ...]) -> dict[str, Any]:
    return {str(status): _json(others.ErrorResponse, _ERRORS[status]) for status in statuses}
