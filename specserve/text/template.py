"""The chat template of a model: messages to the text the model was trained on.

Owns the sandbox. Knows where in the text each piece that a user wrote went, so that the caller can
treat it as text. Knows no tokens.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from specserve.text.messages import PlainMessage
from specserve.types import RequestError

WRITTEN: Final = ("content", "name")  # fields of a message that hold a user's own text


class Span(NamedTuple):
    """Characters [start, end) of a rendered chat, where a field of messages[number] stands."""

    number: int
    field: str
    start: int
    end: int


class ChatTemplate:
    """One compiled template. Raises jinja2's `TemplateSyntaxError` if it is not one."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[PlainMessage], *, add_generation_prompt: bool) -> str:
        """The whole chat as text. Raises `RequestError` for what the template refuses."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            reason = str(error) or type(error).__name__
            raise RequestError(
                "messages", f"the model's chat template cannot render them ({reason})"
            ) from error

    def locate(
        self, messages: Sequence[PlainMessage], text: str, *, add_generation_prompt: bool
    ) -> list[Span] | None:
        """Where in the rendered `text` the fields that users write stand, in order.

        None if the template does more with one than put it there, whole or stripped.
        """
        secret = secrets.token_hex(16)
        written = [(i, field) for i, m in enumerate(messages) for field in WRITTEN if field in m]
        marked = [dict(message) for message in messages]
        for mark, (number, field) in enumerate(written):
            marked[number][field] = f"{secret}x{mark}x"
        try:
            pattern = self.render(marked, add_generation_prompt=add_generation_prompt)
        except RequestError:
            return None
        first, *pieces = re.split(f"{secret}x([0-9]+)x", pattern)
        if not text.startswith(first):
            return None
        at, spans = len(first), []
        for digits, literal in zip(pieces[::2], pieces[1::2], strict=True):
            number, field = written[int(digits)]
            whole = messages[number][field]
            forms = (whole, whole.strip(), whole.lstrip(), whole.rstrip())
            form = next((form for form in forms if text.startswith(form + literal, at)), None)
            if form is None:
                return None
            spans.append(Span(number, field, at, at + len(form)))
            at += len(form) + len(literal)
        return spans if at == len(text) else None


def _refuse(reason: str) -> NoReturn:
    raise TemplateError(reason)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; here its body is all that counts."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
