"""Token ids from text and chats, and back.

Owns the tokenizer and the template of one model directory. Invariant: text that a user wrote never
becomes a control token, however it is spelled, unless the caller allows it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import TemplateSyntaxError
from tokenizers import AddedToken
from tokenizers import Tokenizer as TokenizerFile

from specserve.text.template import ChatTemplate, Message, check_text
from specserve.types import RequestError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class TextError(ValueError):
    """A model directory without a usable tokenizer; the message says why and what to do."""


class Tokenizer:
    """The tokenizer of a model directory: tokenizer.json and what is said about it beside it.

    Raises `TextError` when the files are missing or unusable.
    """

    def __init__(self, directory: Path) -> None:
        # Two, because whether spelled-out control tokens count is a setting of the object.
        self._control = _read_tokenizer(directory)
        self._plain = _read_tokenizer(directory)
        self._plain.encode_special_tokens = True
        config = _read_json(directory / "tokenizer_config.json")
        special = {
            index: token
            for index, token in self._control.get_added_tokens_decoder().items()
            if token.special
        }
        self.special_ids = frozenset(special)
        ordered = sorted(special.items(), key=lambda item: -len(item[1].content))
        self._spelled_ids = [index for index, _ in ordered]
        self._spelled = re.compile("|".join(_pattern(t) for _, t in ordered) or r"(?!)")
        named = {name: _content(config.get(name)) for name in _NAMED_TOKENS}
        self._named = {name: token for name, token in named.items() if token is not None}
        self._template = _read_template(directory, config, self._named)
        self.eos_ids = self._end_tokens(directory)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; a model may have padded its head beyond it."""
        return self._control.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def vocabulary(self) -> dict[str, int]:
        """Every token's id by its spelling in the file."""
        return self._control.get_vocab(with_added_tokens=True)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a prompt, with what the model expects at its start.

        Control tokens spelled out in `text` stay text unless allowed. Raises `RequestError`.
        """
        check_text("prompt", text)
        tokenizer = self._control if allow_special else self._plain
        return tokenizer.encode(text).ids

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a chat under the model's template, ready for the model's answer.

        Control tokens come from the template only. If the template transforms a content beyond
        stripping it, and that content spells a control token, the two cannot be told apart and
        the request is refused. Raises `RequestError` naming the message.
        """
        if self._template is None:
            raise RequestError(
                "messages",
                "this model has no chat template; send a plain prompt, or add a chat_template to "
                "the model's tokenizer_config.json",
            )
        text = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        spans = self._template.locate(messages, text, add_generation_prompt=add_generation_prompt)
        if spans is None:
            self._refuse_spelled(messages)
            spans = []
        controls, injected = [], False
        for match in self._spelled.finditer(text):
            if any(start < match.end() and match.start() < end for start, end in spans):
                injected = True
            else:
                controls.append(match)
        if not injected:
            return self._control.encode(text, add_special_tokens=False).ids
        return self._encode_between(text, controls)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 read as U+FFFD, unknown ids as nothing."""
        return self._control.decode(list(ids), skip_special_tokens=skip_special)

    def _encode_between(self, text: str, controls: Sequence[re.Match[str]]) -> list[int]:
        """Plain text between the given control tokens, cut where the tokenizer itself would."""
        ids, at = [], 0
        for match in controls:
            assert match.lastindex is not None
            ids += self._plain.encode(text[at : match.start()], add_special_tokens=False).ids
            ids.append(self._spelled_ids[match.lastindex - 1])
            at = match.end()
        return ids + self._plain.encode(text[at:], add_special_tokens=False).ids

    def _refuse_spelled(self, messages: Sequence[Message]) -> None:
        for index, message in enumerate(messages):
            match = self._spelled.search(str(message["content"]))
            if match is not None:
                raise RequestError(
                    f"messages[{index}].content",
                    f"it spells the control token {match.group()!r}, and this model's chat "
                    f"template rewrites messages so that it cannot be kept as text; remove it",
                )

    def _end_tokens(self, directory: Path) -> tuple[int, ...]:
        named = self._control.token_to_id(self._named.get("eos_token", ""))
        generation = _read_json(directory / "generation_config.json").get("eos_token_id")
        more = generation if isinstance(generation, list) else [generation]
        ids = [index for index in (named, *more) if isinstance(index, int)]
        return tuple(dict.fromkeys(ids))


def same_vocabulary(a: Tokenizer, b: Tokenizer) -> str | None:
    """None if both give every id to the same token, else the first difference in words."""
    first, second = a.vocabulary(), b.vocabulary()
    if first == second:
        return None
    by_id_a, by_id_b = ({i: token for token, i in v.items()} for v in (first, second))
    index = min(i for i in by_id_a.keys() | by_id_b.keys() if by_id_a.get(i) != by_id_b.get(i))
    names = [
        "no token" if token is None else repr(token)
        for token in (by_id_a.get(index), by_id_b.get(index))
    ]
    return (
        f"id {index} is {names[0]} in one ({len(first)} tokens) and {names[1]} in the other "
        f"({len(second)} tokens)"
    )


def _read_tokenizer(directory: Path) -> TokenizerFile:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise TextError(
            f"{directory}: no tokenizer.json; save the tokenizer again with a recent version of "
            f"the library it came from"
        )
    try:
        tokenizer = TokenizerFile.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise TextError(f"{path}: not a tokenizer ({error}); fetch it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TextError(f"{path}: not a JSON object ({error}); fetch it again") from None


def _read_template(
    directory: Path, config: dict[str, Any], special_tokens: dict[str, str]
) -> ChatTemplate | None:
    """From chat_template.jinja, else tokenizer_config.json, where a list holds several by name."""
    path = directory / "chat_template.jinja"
    source = path.read_text() if path.is_file() else config.get("chat_template")
    if isinstance(source, list):
        named = {
            item.get("name"): item.get("template") for item in source if isinstance(item, dict)
        }
        source = named.get("default")
    if source is None:
        return None
    try:
        return ChatTemplate(str(source), special_tokens)
    except TemplateSyntaxError as error:
        raise TextError(f"{directory}: the chat template is not Jinja: {error}") from None


def _pattern(token: AddedToken) -> str:
    """One group that matches the token, with the space around it that it swallows."""
    before, after = r"\s*" * token.lstrip, r"\s*" * token.rstrip
    return f"{before}({re.escape(token.content)}){after}"


def _content(token: object) -> str | None:
    """A token as tokenizer_config.json writes it: a string, or an object around one."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
