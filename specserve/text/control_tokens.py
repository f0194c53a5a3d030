"""Decides which tokens are control tokens, and keeps user text from being encoded as one.

Owns a copy of the tokenizer in which the control tokens have random, unguessable spellings. User
text is encoded with this copy, so no user text becomes a control token, whatever the normalizer or
the vocabulary does with it. Where a control token is wanted, its random spelling is put into the
text. Knows nothing about chats.
"""

import re
import secrets
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as TokenizerFile

# Tokens that end a turn in published chat models, whether or not their configs say so.
END_OF_TURN: Final = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|EOT|>",
        "<end_of_turn>",
        "<|end_of_turn|>",
        "[|endofturn|]",
        "<end_of_utterance>",
    }
)

_OPENING, _CLOSING = "<[|\uff1c\uff3b", ">]|\uff1e\uff3d"
_HTML_TAG: Final = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|ul|ol|li|dl|dt|dd|p|br|hr|div|span|"
    r"blockquote|pre|code|strong|em|b|i|u|s|sub|sup|a|img)>"
)
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-F]{2}>")  # the spelling of byte tokens in SentencePiece
_SPACE: Final = " \t\r\n\u2581"
_LETTER: Final = re.compile(r"\w")
_SYMBOL: Final = re.compile(r"[^\w\s]")


class EncodingError(ValueError):
    """The text cannot be encoded, for example because the tokenizer has no unknown token."""


def add_named_tokens(tokenizer: TokenizerFile, named: Iterable[str]) -> None:
    """Make `named` tokens of the vocabulary that look like control tokens special added tokens."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [
        AddedToken(token, special=True, normalized=False)
        for token in sorted(set(named) - added)
        if looks_like_control(token) and tokenizer.token_to_id(token) is not None
    ]
    if missing:
        tokenizer.add_special_tokens(missing)


def is_character(tokenizer: TokenizerFile, token: str) -> bool:
    """Whether `token` is a single character of the model's vocabulary.

    Such a token is ordinary text even if it is flagged special: some models pad with one.
    """
    return len(token) == 1 and tokenizer.model.token_to_id(token) is not None


def looks_like_control(token: str) -> bool:
    """Whether `token` is spelled like a control token, such as `<tool_call>` or `[INST]`."""
    shown = token.strip(_SPACE)
    return (
        shown[:1] in _OPENING
        and shown[-1:] in _CLOSING
        and any(map(str.isalnum, shown))
        and not _BYTE_TOKEN.fullmatch(token)
    )


class ControlTokens:
    """The control tokens of `tokenizer`, and encoding of text that must not contain them.

    An added token is a control token if it is flagged special, is in `named` (the tokens that the
    model's files name), occurs in `template_literals` (what the chat template writes), or is
    spelled like one and is no HTML tag. Exceptions: single characters of the vocabulary; tokens
    that the model's merges produce, unless flagged special or spelled like one; and whitespace
    tokens, for which an occurrence in `template_literals` does not count. Raises ValueError if the
    copy of the tokenizer does not keep the token ids.
    """

    def __init__(
        self, tokenizer: TokenizerFile, named: Collection[str], template_literals: Sequence[str]
    ) -> None:
        added = tokenizer.get_added_tokens_decoder()
        known = tokenizer.model.token_to_id
        inside = {t.content for t in added.values() if known(t.content) is not None}
        file = msgspec.json.decode(tokenizer.to_str(), type=dict[str, msgspec.Raw])
        model = msgspec.json.decode(file["model"]) if inside else {}  # it is large
        merged = inside.intersection(map("".join, model.get("merges") or ()))
        template = "\0".join(template_literals)
        secret = secrets.token_hex(8)
        self._tokens: dict[int, AddedToken] = {}
        self._secret_spelling: dict[int, str] = {}
        hidden: dict[str, str] = {}
        for index, token in added.items():
            content, is_marker = token.content, looks_like_control(token.content)
            if is_character(tokenizer, content):
                continue
            if content in merged and not (token.special or is_marker):
                continue
            used = content in named or (content.strip(_SPACE) != "" and content in template)
            if token.special or used or (is_marker and not _HTML_TAG.fullmatch(content)):
                self._tokens[index] = token
                hidden[content] = self._secret_spelling[index] = f"<{secret}x{index}>"
        shown = [token.content.strip(_SPACE) for token in self._tokens.values()]
        self._edges = {*_normalized("".join(token[:1] + token[-1:] for token in shown))}
        self._text_tokenizer = _with_spellings(file, model, hidden)
        id_of = self._text_tokenizer.token_to_id
        if any(id_of(spelling) != index for index, spelling in self._secret_spelling.items()):
            raise ValueError("the ids of its added tokens are not stable")

    def select(self, ids: Sequence[int]) -> list[int]:
        """Those of `ids` that are control tokens, in order."""
        return [index for index in ids if index in self._tokens]

    def spelling_of(self, index: int) -> str:
        return self._tokens[index].content

    def neutralized(self, text: str) -> str:
        """The text changed so that no part of it can become a control token.

        Every character with which a control token begins or ends, in any case or compatibility
        form, is replaced by ".", and "x" is appended. Blank text is returned unchanged.
        """
        return self.without_edges(text) + "x" if text.strip() else text

    def without_edges(self, text: str) -> str:
        """The text without the characters with which a control token begins or ends."""
        edges = {ord(c): "." for c in set(text) if not self._edges.isdisjoint({*_normalized(c)})}
        return text.translate(edges)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; spellings of control tokens in it are encoded as plain text."""
        return encode(self._text_tokenizer, text, add_special_tokens=add_special_tokens)

    def encode_between(
        self, tokenizer: TokenizerFile, text: str, user_ranges: Sequence[tuple[int, int]]
    ) -> list[int]:
        """Token ids of `text`, with control tokens recognised only outside of user text.

        `user_ranges` has the (start, end) of each user text, in order and without overlap. The
        control tokens found do not depend on the content of user texts, except on the kind (letter,
        symbol or space) of their first and last characters. `tokenizer` is the original one.
        """
        blanked, kept = _blank(text, user_ranges)
        encoding = _encoding(tokenizer.encode_batch, blanked, False)
        starts = [part.start for part in kept]
        at, parts = 0, []
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if index not in self._tokens:
                continue
            start, end = self._without_space(index, blanked, start, end)
            part = kept[bisect_right(starts, start) - 1]
            if end <= part.end:
                parts += [text[at : start + part.shift], self._secret_spelling[index]]
                at = end + part.shift
        return self.encode("".join([*parts, text[at:]]))

    def _without_space(self, index: int, text: str, start: int, end: int) -> tuple[int, int]:
        """The range of a token found at [start, end), less the space that it absorbs around it."""
        token, found = self._tokens[index], text[start:end]
        left = len(found) - len(found.lstrip()) if token.lstrip else 0
        right = len(found) - len(found.rstrip()) if token.rstrip else 0
        return start + left, end - right


def _normalized(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def encode(tokenizer: TokenizerFile, text: str, *, add_special_tokens: bool) -> list[int]:
    """The token ids of `text`. Raises `EncodingError`."""
    return _encoding(tokenizer.encode_batch_fast, text, add_special_tokens).ids


def _encoding(encode_batch: Callable[..., list[Encoding]], text: str, special: bool) -> Encoding:
    """Encode one text as a batch, which unlike the library's `encode` lets other threads run."""
    try:
        (encoding,) = encode_batch([text], add_special_tokens=special)
    except MemoryError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise EncodingError(
            f"the model's tokenizer has no tokens for it ({error}); leave out unknown characters"
        ) from None
    return encoding


def _with_spellings(
    file: dict[str, msgspec.Raw], model: dict[str, Any], hidden: Mapping[str, str]
) -> TokenizerFile:
    """A copy of the tokenizer `file` (decoded tokenizer.json) with some tokens respelled.

    `hidden` maps old to new spellings. `model` is the file's decoded model and is modified; it is
    empty if none of these tokens is in its vocabulary.
    """
    added = msgspec.json.decode(file["added_tokens"])
    for token in added:
        token["content"] = hidden.get(token["content"], token["content"])
    changed: dict[str, Any] = file | {"added_tokens": added}
    if model:
        changed["model"] = model
        if isinstance(model["vocab"], dict):
            model["vocab"] = {hidden.get(t, t): index for t, index in model["vocab"].items()}
        else:  # Unigram: pairs of token and score
            model["vocab"] = [(hidden.get(t, t), score) for t, score in model["vocab"]]
        if model.get("merges"):
            model["merges"] = [
                (a, b)
                for a, b in model["merges"]
                if a not in hidden and b not in hidden and a + b not in hidden
            ]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    return TokenizerFile.from_str(msgspec.json.encode(changed).decode())


class _KeptRange(NamedTuple):
    """Characters [start, end) of a blanked text; in the original text they are `shift` later."""

    start: int
    end: int
    shift: int


def _blank(text: str, user_ranges: Sequence[tuple[int, int]]) -> tuple[str, list[_KeptRange]]:
    """Reduce each user text in `text` to its edge characters; returns what is kept, too.

    Only the first and last character of each range in `user_ranges` remain, a letter as "x", a
    symbol as ".", and space as it is. A tokenizer may need them to find the end of neighbouring
    tokens, and they cannot spell a control token.
    """
    at, length, parts, kept = 0, 0, [], []
    for start, end in [*user_ranges, (len(text), len(text))]:
        edges = text[start : min(end, start + 1)] + text[max(end - 1, start + 1) : end]
        parts += [text[at:start], _SYMBOL.sub(".", _LETTER.sub("x", edges))]
        kept.append(_KeptRange(length, length + start - at, at - length))
        length += start - at + len(edges)
        at = end
    return "".join(parts), kept
