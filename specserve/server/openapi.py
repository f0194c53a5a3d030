"""The OpenAPI 3.1 description of the API, generated from the Structs in `protocol/`."""

from functools import cache
from itertools import chain
from typing import Any, Final

import msgspec
from msgspec import Struct

from specserve import __version__
from specserve.server.protocol import others
from specserve.server.protocol.chat import ChatCompletion, ChatRequest
from specserve.server.protocol.completions import Completion, CompletionRequest
from specserve.server.protocol.fields import GenerationFields

_REF: Final = "#/components/schemas/{name}"
# The routes, with the types of request and answer.
_POST: Final[dict[str, tuple[type[Struct], type[Struct]]]] = {
    "/v1/chat/completions": (ChatRequest, ChatCompletion),
    "/v1/completions": (CompletionRequest, Completion),
    "/tokenize": (others.TokenizeRequest, others.TokenizeResponse),
    "/detokenize": (others.DetokenizeRequest, others.DetokenizeResponse),
}
_GET: Final[dict[str, type[Struct]]] = {
    "/v1/models": others.ModelList,
    "/v1/models/{model}": others.Model,
    "/health": others.Health,
    "/ready": others.Readiness,
    "/version": others.Version,
    "/v1/speculation": others.SpeculationReport,
}
_PUBLIC: Final = {"/health", "/ready", "/version"}
_GET_ERRORS: Final = (400, 401, 403, 503)
_POST_ERRORS: Final = (*_GET_ERRORS, 404, 408, 413, 415, 429, 500, 504)


@cache
def openapi() -> dict[str, Any]:
    structs = (*chain.from_iterable(_POST.values()), *_GET.values(), others.ErrorResponse)
    schemas = msgspec.json.schema_components(structs, ref_template=_REF)[1]
    metrics = {"get": {"responses": {"200": _content("text/plain", {"type": "string"})}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "specserve", "version": __version__},
        "paths": {
            **{path: {"post": _post(*types)} for path, types in _POST.items()},
            **{path: {"get": _get(path, answer)} for path, answer in _GET.items()},
            "/metrics": metrics,
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _post(body: type[Struct], answer: type[Struct]) -> dict[str, Any]:
    success = _json(answer)
    if issubclass(body, GenerationFields):
        success["content"]["text/event-stream"] = {}  # a chunk per event, then [DONE]
    return {
        "requestBody": {"required": True, "content": _json(body)["content"]},
        "responses": {"200": success, **_errors(_POST_ERRORS)},
    }


def _get(path: str, answer: type[Struct]) -> dict[str, Any]:
    if path in _PUBLIC:
        return {"security": [], "responses": {"200": _json(answer), "503": _json(answer)}}
    operation: dict[str, Any] = {"responses": {"200": _json(answer), **_errors(_GET_ERRORS)}}
    if "{model}" in path:
        operation["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
        operation["responses"] |= _errors((404,))
    return operation


def _json(struct: type[Struct]) -> dict[str, Any]:
    return _content("application/json", {"$ref": _REF.format(name=struct.__name__)})


def _content(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "the answer", "content": {kind: {"schema": schema}}}


def _errors(statuses: tuple[int, ...]) -> dict[str, Any]:
    answer = {**_json(others.ErrorResponse), "description": "an error"}
    return {str(status): answer for status in statuses}
