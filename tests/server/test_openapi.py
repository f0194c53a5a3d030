"""The OpenAPI document: complete, valid, and true of a running server."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from live import LiveServer, start_server

from specserve.server.app import build_app
from specserve.server.auth import Keyring
from specserve.server.descriptions import DESCRIPTIONS
from specserve.server.openapi import openapi
from specserve.server.service import Service
from specserve_evals.fuzz import fuzz
from specserve_evals.served import Served


def test_it_describes_exactly_the_routes() -> None:
    app = build_app(cast(Service, None), Keyring())
    routes = {
        (route.resource.canonical, route.method.lower())
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    described = {
        (path, method) for path, methods in openapi()["paths"].items() for method in methods
    }
    assert described == routes - {("/openapi.json", "get"), ("/docs", "get")}


def test_every_reference_resolves() -> None:
    references = list(find_references(openapi()))
    assert len(references) > 20
    for reference in references:
        place: Any = openapi()
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]
        assert place


def properties(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name with the name of its schema, schema) of every field, at any depth."""
    if isinstance(node, dict):
        for name, field in node.get("properties", {}).items():
            yield f"{node['title']}.{name}", field
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for value in values:
        yield from properties(value)


def test_every_field_is_described_and_no_text_is_left_over() -> None:
    fields = dict(properties(openapi()["components"]["schemas"]))
    assert len(fields) > 200
    assert {"Message.role", "ChatChunk.obfuscation", "ChatDelta.content"} < set(fields)
    for name, schema in fields.items():
        assert len(schema["description"]) > 5, name
    used = set(fields) | {name.partition(".")[2] for name in fields if name not in DESCRIPTIONS}
    assert set(DESCRIPTIONS) <= used


def test_every_operation_parameter_and_answer_is_described() -> None:
    for path, methods in openapi()["paths"].items():
        for operation in methods.values():
            assert operation["summary"], path
            assert all(each["description"] for each in operation.get("parameters", [])), path
            assert all(each["description"] for each in operation["responses"].values()), path


def test_the_examples_are_answered(live_server: LiveServer) -> None:
    paths = openapi()["paths"]
    contents = {
        path: methods["post"]["requestBody"]["content"]["application/json"]
        for path, methods in paths.items()
        if "post" in methods
    }
    assert len(contents) >= 4
    for path, content in contents.items():
        assert live_server.ask(path, content["example"]).status == 200, path


def test_nothing_of_it_is_loaded_before_it_is_asked_for() -> None:
    modules = "{'specserve.server.openapi', 'specserve.server.descriptions'}"
    code = (
        f"import sys, specserve.server.lifecycle; sys.exit(not {modules}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def find_references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from find_references(value)
    elif isinstance(node, list):
        for value in node:
            yield from find_references(value)


def test_the_server_serves_it(live_server: LiveServer) -> None:
    assert live_server.ask("/openapi.json").json() == json.loads(json.dumps(openapi()))


def test_random_requests_find_nothing(chat_model: Path) -> None:
    """A short run of `python -m specserve_evals.fuzz`."""
    with start_server(chat_model, "--max-output-tokens", "4") as server:
        rounds = fuzz(Served(server.url, server.process.pid), 250, 1, ("fuzzing",))
        server.wait_until_idle()
    assert sum(each.test_cases.generated for each in rounds) >= 250
    assert [(each.failures, each.errors) for each in rounds] == [((), ())] * len(rounds)


class Broken(BaseHTTPRequestHandler):
    """A server whose only route fails."""

    def do_GET(self) -> None:
        described = self.path == "/openapi.json"
        operation = {"get": {"responses": {"200": {"description": "fine"}}}}
        document = {"openapi": "3.1.0", "info": {"title": "a", "version": "1"}}
        body = json.dumps({**document, "paths": {"/fails": operation}}).encode()
        self.send_response(200 if described else 500)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def broken_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_fails_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with broken_server() as url:
        (found,) = fuzz(Served(url, 0), 10, 1, ("fuzzing",))
    assert "GET /fails" in found.failures[0].operations
    assert "curl" in capsys.readouterr().out
