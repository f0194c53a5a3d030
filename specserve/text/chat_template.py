"""The chat template of a model: renders messages to the text format the model was trained on.

Owns the Jinja sandbox. Finds where the rendered text has user text, so that the caller can encode
it without control tokens, and rejects messages that the template omits. Knows nothing about tokens.

A template is a program by the model's author, and rendering it can take unbounded time and memory.
A server must render in a process that can be killed. Compiling a template runs none of its code.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from specserve.text.chat_messages import PlainMessage, user_texts
from specserve.types import RequestError

# Roles of the chats that `template_literals` renders.
_SAMPLE_CHATS: Final = (("user",), ("system", "user", "assistant", "user"), ("user", "assistant"))

Variables = Mapping[str, Any]  # of the template: add_generation_prompt, tools, those of a request
# Variables that are set from other fields of a request.
_RESERVED: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_END_OF_THINKING: Final = "</think>"


class TemplateUnusable(ValueError):
    """The template cannot be compiled; the message says why."""


class Span(NamedTuple):
    """Characters [start, end) of a rendered chat that hold `field` of messages[number]."""

    number: int
    field: str
    start: int
    end: int
    mark_end: int  # end of the field's mark in `Rendering.marked`


class Rendering(NamedTuple):
    """A rendered chat, and the same chat rendered with a mark in place of each user text.

    `spans` has the places of the user texts in `text`, in order. It is None if the template changes
    them by more than stripping space or removing the thinking at their beginning. `marked` is None
    if the template raises an error for the marks.
    """

    text: str
    marked: str | None
    spans: list[Span] | None

    def up_to_content(self, number: int) -> "Rendering":
        """The rendering up to the end of the content of messages[number]. Raises `RequestError`."""
        spans = self.spans or []
        last = max((i for i, s in enumerate(spans) if s[:2] == (number, "content")), default=None)
        if last is None or self.marked is None:
            raise RequestError(
                "continue_final_message",
                "this model's chat template rewrites messages, so that the end of the last one "
                "cannot be found; leave it out",
            )
        end = spans[last]
        return Rendering(self.text[: end.end], self.marked[: end.mark_end], spans[: last + 1])


class ChatTemplate:
    """A compiled chat template. The constructor raises `TemplateUnusable`.

    `special_tokens` are variables of the template, such as bos_token. Developer messages are
    rendered as system messages if the template does not mention the role `developer`.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[loopcontrols, _GenerationTag],
        )
        environment.code_generator_class = _Compiler
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
            self._constants = _constants(tree)
        except Exception as error:  # compiling a faulty template can raise any exception
            raise TemplateUnusable(_one_line(error)) from None
        self._variables = {name.name for name in tree.find_all(nodes.Name)}
        self._globals = frozenset(environment.globals)
        self._knows_developers = "developer" in self._constants

    def check_variables(self, names: Iterable[str]) -> None:
        """Raise `RequestError` for a variable that a request may not set or that is not used."""
        free = self._variables - {*_RESERVED, *self._special_tokens, *self._globals}
        for name in names:
            if name not in free:
                known = ", ".join(sorted(free)[:8]) or "none"
                raise RequestError(
                    f"chat_template_kwargs.{name[:64]}",
                    f"no variable of this model's chat template; leave it out (there are: {known})",
                )

    def render(self, messages: Sequence[PlainMessage], variables: Variables) -> Rendering:
        """Render a chat. Raises `RequestError` if the template fails or omits a user text."""
        text = self.text(messages, variables)
        self._check_calls_are_rendered(messages, variables)
        marks = _Marks(messages)
        try:
            marked = self.text(marks.messages(), variables)
        except RequestError:
            return Rendering(text, None, None)
        for number, field in marks.missing(marked):
            self._check_field_is_rendered(messages, number, field, text, variables)
        spans = marks.locate(text, marked)
        if spans is None and marks.with_blanks:
            # Many templates write no turn, or a default text, for a blank content.
            marks = _Marks(messages, with_blanks=False)
            marked = self.text(marks.messages(), variables)
            spans = marks.locate(text, marked)
        return Rendering(text, marked, spans)

    def text(self, messages: Sequence[PlainMessage], variables: Variables) -> str:
        """Render a chat to text only. Raises `RequestError` if the template fails."""
        chat = [dict(message) for message in messages]
        for message in chat:
            if message["role"] == "developer" and not self._knows_developers:
                message["role"] = "system"  # its name in older models
        given = {"tools": None, "documents": None, **self._special_tokens, **variables}
        try:
            return self._template.render(**given, messages=chat)
        except Exception as error:  # a template is a program and can raise any exception
            raise RequestError(
                "messages", f"the model's chat template cannot render them ({_one_line(error)})"
            ) from error

    def template_literals(self) -> list[str]:
        """Texts that the template itself writes: its constants, and chats with empty contents."""
        texts = list(self._constants)
        for roles in _SAMPLE_CHATS:
            chat = [{"role": role, "content": ""} for role in roles]
            for generate in (True, False):
                try:
                    texts.append(self.text(chat, {"add_generation_prompt": generate}))
                except RequestError:
                    continue
        return texts

    def _check_calls_are_rendered(
        self, messages: Sequence[PlainMessage], variables: Variables
    ) -> None:
        """Raise `RequestError` for tool calls whose functions the rendered chat does not name."""
        others = [dict(message) for message in messages]
        names: dict[int, list[str]] = {}
        for number, message in enumerate(others):
            if calls := message.get("tool_calls"):
                names[number] = [secrets.token_hex(16) for _ in calls]
                message["tool_calls"] = [
                    call | {"function": call["function"] | {"name": name}}
                    for call, name in zip(calls, names[number], strict=True)
                ]
        if not names:
            return
        try:
            text = self.text(others, variables)
        except RequestError:
            return
        for number, secret_names in names.items():
            if not all(name in text for name in secret_names):
                raise RequestError(
                    f"messages[{number}].tool_calls",
                    "this model's chat template has no place for tool calls; put them into the "
                    "content",
                )

    def _check_field_is_rendered(
        self,
        messages: Sequence[PlainMessage],
        number: int,
        field: str,
        text: str,
        variables: Variables,
    ) -> None:
        """Raise `RequestError` if the rendered chat does not depend on the field's value."""
        others = [dict(message) for message in messages]
        others[number][field] = secrets.token_hex(16)
        try:
            unchanged = self.text(others, variables) == text
        except RequestError:
            return
        if unchanged and field == "name":
            raise RequestError(
                f"messages[{number}].name",
                "this model's chat template has no place for names; leave it out",
            )
        if unchanged:
            raise RequestError(
                f"messages[{number}].content",
                f"this model's chat template leaves out this message of role "
                f"{messages[number]['role']!r}; put its content into another message",
            )


class _Marks:
    """Replaces `user_texts` by unguessable marks; `with_blanks`: also those without text."""

    def __init__(self, messages: Sequence[PlainMessage], *, with_blanks: bool = True) -> None:
        self._secret = secrets.token_hex(16)
        self._mark = re.compile(f"{self._secret}x([0-9]+)x", re.IGNORECASE)
        self._messages = messages
        fields = [(i, f) for i, m in enumerate(messages) for f in user_texts(m)]
        with_text = [(i, field) for i, field in fields if messages[i][field].strip()]
        self._fields = fields if with_blanks else with_text
        self.with_blanks = len(self._fields) > len(with_text)

    def messages(self) -> list[PlainMessage]:
        marked = [dict(message) for message in self._messages]
        for mark, (number, field) in enumerate(self._fields):
            marked[number][field] = f"{self._secret}x{mark}x"
        return marked

    def missing(self, marked: str) -> list[tuple[int, str]]:
        """The fields whose mark is not in `marked`, ignoring case."""
        found = {int(digits) for digits in self._mark.findall(marked)}
        return [place for mark, place in enumerate(self._fields) if mark not in found]

    def locate(self, text: str, marked: str) -> list[Span] | None:
        """The places of the fields in `text`, found by those of the marks in `marked`.

        None if `text` is not `marked` with each mark replaced by a form of its field (`_forms`).
        """
        marks = [*self._mark.finditer(marked)]
        ends = [*(mark.start() for mark in marks), len(marked)]
        if not text.startswith(marked[: ends[0]]):
            return None
        at, spans = ends[0], []
        for mark, end in zip(marks, ends[1:], strict=True):
            number, field = self._fields[int(mark[1])]
            literal = marked[mark.end() : end]
            forms = _forms(self._messages[number][field])
            form = next((form for form in forms if text.startswith(form + literal, at)), None)
            if form is None:
                return None
            spans.append(Span(number, field, at, at + len(form), mark.end()))
            at += len(form) + len(literal)
        return spans if at == len(text) else None


def _forms(content: str) -> list[str]:
    """The forms in which templates insert a text: whole or without thinking, stripped or not."""
    answer = content.rpartition(_END_OF_THINKING)[2]
    return [
        form
        for text in (content, answer)
        for form in (text, text.strip(), text.lstrip(), text.rstrip(), text.lstrip("\n"))
    ]


class _Compiler(CodeGenerator):
    """Compiles constant expressions, such as `'x' * 10**10`, without evaluating them."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData | nodes.Const):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def visit_EvalContextModifier(self, node: nodes.EvalContextModifier, frame: Any) -> None:
        if not all(isinstance(option.value, nodes.Const) for option in node.options):
            self.fail("autoescape takes true or false", node.lineno)
        super().visit_EvalContextModifier(node, frame)


def _constants(tree: nodes.Template) -> list[str]:
    """The text between the tags, and the string literals in them."""
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    return [*texts, *(c.value for c in tree.find_all(nodes.Const) if isinstance(c.value, str))]


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if len(reason) <= 200 else f"{reason[:200]}..."


def _raise_exception(reason: str) -> NoReturn:
    raise TemplateError(reason)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """The filter `tojson`, without the HTML escapes of Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _GenerationTag(Extension):
    """`{% generation %}` marks text that a model is trained on; here only its body is rendered."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
