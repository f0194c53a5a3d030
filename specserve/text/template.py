"""The chat template of a model: messages to the text the model was trained on.

Owns the sandbox and the check of messages. Knows where in the text each message's content went,
so that the caller can treat it as text. Knows no tokens.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from specserve.types import RequestError

Message = Mapping[str, object]  # {"role": ..., "content": ...}
ROLES: Final = ("system", "developer", "user", "assistant", "tool")


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

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The whole chat as text. Raises `RequestError` for what the template refuses."""
        check_messages(messages)
        return self._render(messages, add_generation_prompt)

    def locate(
        self, messages: Sequence[Message], text: str, *, add_generation_prompt: bool
    ) -> list[tuple[int, int]] | None:
        """Where in the rendered `text` the contents stand, as (start, end) in order.

        None if the template does more with a content than put it there, whole or stripped.
        """
        marks = [secrets.token_hex(16) for _ in messages]
        marked = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
        try:
            pattern = self._render(marked, add_generation_prompt)
        except RequestError:
            return None
        contents = {
            mark: str(message["content"]) for mark, message in zip(marks, messages, strict=True)
        }
        first, *pieces = re.split(f"({'|'.join(marks)})", pattern)
        if not text.startswith(first):
            return None
        at, spans = len(first), []
        for mark, literal in zip(pieces[::2], pieces[1::2], strict=True):
            content = contents[mark]
            forms = (content, content.strip(), content.lstrip(), content.rstrip())
            form = next((form for form in forms if text.startswith(form + literal, at)), None)
            if form is None:
                return None
            spans.append((at, at + len(form)))
            at += len(form) + len(literal)
        return spans if at == len(text) else None

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise RequestError(
                "messages", f"the model's chat template cannot render them ({error})"
            ) from error


def check_messages(messages: Sequence[Message]) -> None:
    """Raise `RequestError` naming the first field that cannot be used, like messages[2].role."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages", "expected a list of at least one message")
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(name, f"{message!r} is no object with role and content")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise RequestError(f"{name}.{field}", f"{message.get(field)!r} is not a string")
            check_text(f"{name}.{field}", str(message[field]))
        if message["role"] not in ROLES:
            raise RequestError(
                f"{name}.role", f"{message['role']!r} is not one of {', '.join(ROLES)}"
            )
        extra = sorted(str(key) for key in message if key not in ("role", "content"))
        if extra:
            raise RequestError(
                f"{name}.{extra[0]}", "unknown field; a message has role and content"
            )


def check_text(name: str, text: str) -> None:
    """Raise `RequestError` for text that is not Unicode: JSON can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            name, f"character {error.start} is a lone surrogate; send valid Unicode"
        ) from None


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
