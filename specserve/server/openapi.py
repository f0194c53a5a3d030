"""The OpenAPI 3.1 description of the API, generated from the Structs in `protocol/`."""

from functools import cache
from typing import Any, Final

import msgspec
from msgspec import Struct

from specserve import __version__
from specserve.server.protocol import others
from specserve.server.protocol.chat import ChatCompletion, ChatRequest
from specserve.server.protocol.completions import Completion, CompletionRequest

_REF: Final = "#/components/schemas/{name}"
_STRUCTS: Final[tuple[type[Struct], ...]] = (
    *(ChatRequest, ChatCompletion, CompletionRequest, Completion),
    *(others.TokenizeRequest, others.TokenizeResponse),
    *(others.DetokenizeRequest, others.DetokenizeResponse),
    *(others.Model, others.ModelList, others.Health, others.Readiness, others.Version),
    *(others.SpeculationReport, others.ErrorResponse),
)
_GET_ERRORS: Final = (400, 401, 403, 503)
_POST_ERRORS: Final = (*_GET_ERRORS, 404, 408, 413, 415, 429, 500, 504)


@cache
def openapi() -> dict[str, Any]:
    schemas = msgspec.json.schema_components(_STRUCTS, ref_template=_REF)[1]
    return {
        "openapi": "3.1.0",
        "info": {"title": "specserve", "version": __version__},
        "paths": {
            "/v1/chat/completions": _post(ChatRequest, ChatCompletion, streams=True),
            "/v1/completions": _post(CompletionRequest, Completion, streams=True),
            "/v1/models": _get(others.ModelList),
            "/v1/models/{model}": _get(others.Model, parameter="model"),
            "/tokenize": _post(others.TokenizeRequest, others.TokenizeResponse),
            "/detokenize": _post(others.DetokenizeRequest, others.DetokenizeResponse),
            "/health": _get(others.Health, public=True),
            "/ready": _get(others.Readiness, public=True),
            "/version": _get(others.Version, public=True),
            "/v1/speculation": _get(others.SpeculationReport),
            "/metrics": {"get": {"responses": {"200": _content("text/plain", {"type": "string"})}}},
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _post(body: type[Struct], answer: type[Struct], *, streams: bool = False) -> dict[str, Any]:
    success = _json(answer)
    if streams:
        success["content"]["text/event-stream"] = {}  # a chunk per event, then [DONE]
    content = {"application/json": {"schema": _schema(body)}}
    return {
        "post": {
            "requestBody": {"required": True, "content": content},
            "responses": {"200": success, **_errors(_POST_ERRORS)},
        }
    }


def _get(
    answer: type[Struct], *, parameter: str | None = None, public: bool = False
) -> dict[str, Any]:
    operation: dict[str, Any] = {"responses": {"200": _json(answer), **_errors(_GET_ERRORS)}}
    if public:
        operation["security"] = []
        operation["responses"] = {"200": _json(answer), "503": _json(answer)}
    if parameter is not None:
        operation["parameters"] = [
            {"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
        operation["responses"] |= _errors((404,))
    return {"get": operation}


def _schema(struct: type[Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=struct.__name__)}


def _json(struct: type[Struct]) -> dict[str, Any]:
    return _content("application/json", _schema(struct))


def _content(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "the answer", "content": {kind: {"schema": schema}}}


def _errors(statuses: tuple[int, ...]) -> dict[str, Any]:
    answer = {**_json(others.ErrorResponse), "description": "an error"}
    return {str(status): answer for status in statuses}
