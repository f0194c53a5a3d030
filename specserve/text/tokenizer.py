"""Token ids from text and chats, and back.

Owns the tokenizer and the template of one model directory. Invariant: text that a user wrote never
becomes a control token, however it is spelled, unless the caller allows it.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import TemplateSyntaxError
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as TokenizerFile

from specserve.text.detokenizer import Detokenizer
from specserve.text.messages import Message, PlainMessage, check_text, read_messages
from specserve.text.template import WRITTEN, ChatTemplate, Span
from specserve.types import RequestError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_NORMALISED = 4  # bytes that Unicode's normal forms make one of at most, as in U+1D400 to "A"


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
        self.detokenizer = _detokenizer(self._control, directory)
        ordered = sorted(special.items(), key=lambda item: -len(item[1].content))
        self._spelled_ids = [index for index, _ in ordered]
        self._spelled = re.compile("|".join(_pattern(t) for _, t in ordered) or r"(?!)")
        named = {name: _content(config.get(name)) for name in _NAMED_TOKENS}
        self._named = {name: token for name, token in named.items() if token is not None}
        eos = self._control.token_to_id(self._named.get("eos_token", ""))
        self.hidden_ids = self.special_ids if eos is None else self.special_ids | {eos}
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

    def max_token_bytes(self) -> int | None:
        """How many bytes of text one token stands for at most, not counting control tokens.

        None if there is no such number: unknown words, or space that is dropped.
        """
        model = self._plain.model
        bytewise = isinstance(self._plain.decoder, decoders.ByteLevel)
        if not isinstance(model, models.BPE) or not (bytewise or model.byte_fallback):
            return None
        longest = max(len(token.encode()) for token in self.vocabulary())
        return longest if self._plain.normalizer is None else longest * _NORMALISED

    def encode(
        self, text: str, *, allow_special: bool = False, add_special: bool = True
    ) -> list[int]:
        """Token ids of a prompt, with what the model expects at its start unless told not to.

        Control tokens spelled out in `text` stay text unless allowed. Raises `RequestError`.
        """
        check_text("prompt", text)
        tokenizer = self._control if allow_special else self._plain
        return _encode(tokenizer, [text], add_special_tokens=add_special)[0]

    def chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of a chat under the model's template, ready for the model's answer.

        With `continue_final_message` they end where the last message does, an assistant's.
        Control tokens come from the template only. If the template transforms a content beyond
        stripping it, and that content spells a control token, the two cannot be told apart and
        the request is refused. Raises `RequestError` naming the message.
        """
        plain = read_messages(messages)
        if continue_final_message:
            _check_continued(plain, add_generation_prompt)
        if self._template is None:
            raise RequestError(
                "messages",
                "this model has no chat template; send a plain prompt, or add a chat_template to "
                "the model's tokenizer_config.json",
            )
        text = self._template.render(plain, add_generation_prompt=add_generation_prompt)
        spans = self._template.locate(plain, text, add_generation_prompt=add_generation_prompt)
        if continue_final_message:
            text = text[: _end_of_last(plain, spans)]
        if spans is None:
            self._refuse_spelled(plain)
            spans = []
        controls, injected = [], False
        for match in self._spelled.finditer(text):
            if _overlaps(spans, match):
                injected = True
            else:
                controls.append(match)
        if not injected:
            return _encode(self._control, [text], add_special_tokens=False)[0]
        return self._encode_between(text, controls)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 read as U+FFFD, unknown ids as nothing."""
        skipped = self.hidden_ids if skip_special else frozenset()
        return self.detokenizer.text([index for index in ids if index not in skipped])

    def _encode_between(self, text: str, controls: Sequence[re.Match[str]]) -> list[int]:
        """Plain text between the given control tokens, cut where the tokenizer itself would."""
        starts = [0, *(match.end() for match in controls)]
        ends = [*(match.start() for match in controls), len(text)]
        between = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        first, *rest = _encode(self._plain, between, add_special_tokens=False)
        ids = first
        for match, more in zip(controls, rest, strict=True):
            assert match.lastindex is not None
            ids += [self._spelled_ids[match.lastindex - 1], *more]
        return ids

    def _refuse_spelled(self, messages: Sequence[PlainMessage]) -> None:
        for index, message in enumerate(messages):
            for field in WRITTEN:
                match = self._spelled.search(message.get(field, ""))
                if match is not None:
                    raise RequestError(
                        f"messages[{index}].{field}",
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


def _encode(
    tokenizer: TokenizerFile, texts: list[str], *, add_special_tokens: bool
) -> list[list[int]]:
    """The ids of each text. Unlike the library's `encode` this lets other threads run."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encodings]


def _check_continued(messages: Sequence[PlainMessage], add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise RequestError(
            "continue_final_message", "contradicts add_generation_prompt; set one of them to false"
        )
    role = messages[-1]["role"]
    if role != "assistant":
        raise RequestError(
            "continue_final_message",
            f"the last message is of role {role!r}; only an assistant's can be continued",
        )


def _end_of_last(messages: Sequence[PlainMessage], spans: list[Span] | None) -> int:
    """Where the content of the last message ends in the rendered text."""
    last = (len(messages) - 1, "content")
    ends = [span.end for span in spans or () if (span.number, span.field) == last]
    if not ends:
        raise RequestError(
            "continue_final_message",
            "this model's chat template rewrites messages, so that the end of the last one cannot "
            "be found; leave it out",
        )
    return ends[-1]


def _overlaps(spans: list[Span], match: re.Match[str]) -> bool:
    """Whether a match touches one of the spans, which are in order and apart."""
    before = bisect_left(spans, match.end(), key=attrgetter("start"))
    return before > 0 and match.start() < spans[before - 1].end


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


def _detokenizer(tokenizer: TokenizerFile, directory: Path) -> Detokenizer:
    try:
        return Detokenizer(tokenizer)
    except ValueError as error:
        raise TextError(f"{directory / 'tokenizer.json'}: {error}") from None


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
