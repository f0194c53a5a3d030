"""The page /docs: it shows the whole API, loads nothing and runs nothing."""

import base64
import hashlib
from collections import Counter
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from live import LiveServer, Reply

from specserve.server.descriptions import DESCRIPTIONS
from specserve.server.openapi import openapi

_ALONE = {"meta", "!doctype"}  # tags that are not closed


class Page(HTMLParser):
    """What a page has: its tags, attributes, ids, links, the texts of its cells, its style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = self.style = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _ALONE:
            self.open.append(tag)
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def reply(live_server: LiveServer) -> Reply:
    return live_server.ask("/docs")


@pytest.fixture(scope="module")
def page(reply: Reply) -> Page:
    return Page(reply.body.decode())


def test_it_is_a_small_page_of_html(reply: Reply, page: Page) -> None:
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.open == []
    assert len(reply.body) < 100_000


def test_it_shows_every_route_field_and_example(page: Page) -> None:
    document = openapi()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"{method.upper()} {path}" in page.text
            assert operation["summary"] in page.text
            assert path in page.ids
    for name, schema in document["components"]["schemas"].items():
        assert name in page.ids
        assert all(field in page.text for field in schema["properties"])
    assert all(text.replace("`", "") in page.text for text in DESCRIPTIONS.values())
    assert '"messages": [{"role": "user"' in page.text
    assert "number (above 0, up to 1)" in page.text
    assert "boolean, default true" in page.text
    assert "Message (1 to 2048 entries), required" in page.text


def test_it_loads_nothing_and_runs_nothing(reply: Reply, page: Page) -> None:
    assert page.tags.keys().isdisjoint({"script", "link", "img", "iframe", "object", "form"})
    assert page.attributes == {"charset", "content", "href", "id", "lang", "name"}
    assert len(set(page.ids)) == len(page.ids)
    targets = {unquote(link) for link in page.links} - {"/openapi.json"}
    assert targets <= {f"#{name}" for name in page.ids}
    assert "url(" not in page.style
    assert "@import" not in page.style
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    policy = dict(
        part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";")
    )
    assert policy == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert reply.headers["x-content-type-options"] == "nosniff"
