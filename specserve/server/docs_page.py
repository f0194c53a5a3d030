"""The page `/docs`: openapi.json as HTML for people. It loads nothing and runs no script."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from functools import cache
from html import escape
from typing import Any, Final

from specserve.server.openapi import openapi

_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3rem; border-top: 1px solid #8886; padding-top: 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.875em; }
pre { padding: 0.75rem; background: #8882; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 1rem 0.3rem 0; }
tr { border-bottom: 1px solid #8883; }
th { font-weight: normal; }
td:nth-child(2) { width: 28%; }
"""
_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
# Nothing but the style above is applied, and no other page may embed this one.
CONTENT_SECURITY_POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SCHEMAS: Final = "#/components/schemas/"
_NULL: Final = {"type": "null"}
_RANGES: Final = (  # keywords of the bounds, and the unit
    ("minimum", "maximum", ""),
    ("minLength", "maxLength", " characters"),
    ("minItems", "maxItems", " entries"),
    ("minProperties", "maxProperties", " entries"),
)
_NO_LIMIT: Final = 2**31 - 1  # a maximum from here on is not worth showing


@cache
def docs_page() -> str:
    """The page; made when it is asked for first."""
    document = openapi()
    schemas = document["components"]["schemas"]
    operations = [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    bodies = {_body(operation)[0] for _, _, operation in operations if "requestBody" in operation}
    parts = [
        f"<h1>specserve {escape(document['info']['version'])}</h1>",
        f"<p>{_text(document['info']['description'])} The same as JSON, for programs: "
        "<a href='/openapi.json'>openapi.json</a>. In the examples, <code>$URL</code> is the "
        "address of this server and <code>$KEY</code> an API key, if it has any.</p>",
        _table(
            (_link(path, f"{method} {path}"), _text(operation["summary"]))
            for method, path, operation in operations
        ),
        *(_operation(*each, schemas) for each in operations),
        "<h2>Types</h2>",
        *(_schema(name, schema) for name, schema in schemas.items() if name not in bodies),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'><title>specserve API</title>"
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    parts = [f"<h2 id='{path}'>{method} {escape(path)}</h2>", f"<p>{_text(operation['summary'])}."]
    if operation.get("security") == []:
        parts.append("Needs no API key.")
    parts.append("</p>")
    if "requestBody" in operation:
        name, example = _body(operation)
        command = (
            f"curl $URL{path} -H 'Content-Type: application/json' "
            f"-H \"Authorization: Bearer $KEY\" \\\n  -d '{json.dumps(example)}'"
        )
        parts += [f"<pre>{escape(command)}</pre>", _schema(name, schemas[name], request=True)]
    parameters = operation.get("parameters", [])
    parts += [f"<p><code>{p['name']}</code>: {_text(p['description'])}</p>" for p in parameters]
    parts.append(_table(_responses(operation["responses"])))
    return "\n".join(parts)


def _responses(responses: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(status and type, meaning) of every answer."""
    for status, response in sorted(responses.items()):
        schema = next(iter(response["content"].values()))["schema"]
        yield f"{status} {_type(schema)}", _text(response["description"])


def _body(operation: dict[str, Any]) -> tuple[str, Any]:
    """The name of the request's type, and an example of it."""
    content = operation["requestBody"]["content"]["application/json"]
    return content["schema"]["$ref"].removeprefix(_SCHEMAS), content["example"]


def _schema(name: str, schema: dict[str, Any], *, request: bool = False) -> str:
    required = schema.get("required", ()) if request else ()
    rows = (
        (
            f"<code>{field}</code>",
            _type(value, default=request) + (", required" if field in required else ""),
            _text(value["description"]),
        )
        for field, value in sorted(
            schema.get("properties", {}).items(), key=lambda item: item[0] not in required
        )
    )
    about = f"<p>{_text(schema['description'])}</p>" if "description" in schema else ""
    return f"<h3 id='{name}'>{name}</h3>{about}{_table(rows)}"


def _type(schema: dict[str, Any], *, default: bool = False) -> str:
    """The type as HTML, with its bounds. `default`: also what it is if the field is left out."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(_SCHEMAS)
        return _link(name, name)
    if "anyOf" in schema:
        hidden = [_NULL] if default and schema.get("default", ...) is None else []
        shown = " or ".join(_type(each) for each in schema["anyOf"] if each not in hidden)
    elif "enum" in schema:
        shown = " or ".join(escape(json.dumps(value)) for value in schema["enum"])
    elif schema.get("type") == "array":
        shown = f"list of {_type(schema['items'])}" if "items" in schema else "list"
    else:
        shown = str(schema.get("type", "anything"))
        if isinstance(schema.get("additionalProperties"), dict):
            shown += f" of {_type(schema['additionalProperties'])}"
    if default and schema.get("default") is not None:
        shown += f", default {json.dumps(schema['default'])}"
    return shown + "".join(_ranges(schema))


def _ranges(schema: dict[str, Any]) -> Iterator[str]:
    """The range of a number, of the length of a string, of the number of entries."""
    if "exclusiveMinimum" in schema:
        yield f" (above {schema['exclusiveMinimum']}, up to {schema['maximum']})"
        return
    for low_key, high_key, unit in _RANGES:
        low, high = schema.get(low_key), schema.get(high_key, _NO_LIMIT)
        if high < _NO_LIMIT:
            yield f" ({'up to' if low is None else f'{low} to'} {high}{unit})"
        elif low is not None:
            yield f" (from {low}{unit})"


def _table(rows: Iterator[tuple[str, ...]]) -> str:
    """Rows of HTML cells; the first cell is the row's heading."""
    lines = (f"<tr><th>{row[0]}</th><td>{'</td><td>'.join(row[1:])}</td></tr>" for row in rows)
    return "<table>" + "\n".join(lines) + "</table>"


def _link(target: str, text: str) -> str:
    return f"<a href='#{target}'><code>{escape(text)}</code></a>"


def _text(text: str) -> str:
    """Text with `code` as HTML."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
