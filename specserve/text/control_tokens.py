"""Which tokens of a tokenizer are control tokens, and how text is kept from becoming one.

Owns a second tokenizer: the same one, but its control tokens have unguessable spellings. What users
write is encoded by it, so nothing they can write, however a normaliser or the vocabulary reads
it, becomes a control token; where one is wanted, its secret spelling stands in the text and the
tokenizer treats it as it treats the token itself. Knows no chats.
"""

import re
import secrets
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as TokenizerFile

# Tokens that end a turn in published chat models, whatever their configs call them.
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

_MARKER: Final = re.compile(r"[<\[|\uff1c\uff3b].*\w.*[>\]|\uff1e\uff3d]", re.DOTALL)
_HTML: Final = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|ul|ol|li|dl|dt|dd|p|br|hr|div|span|"
    r"blockquote|pre|code|strong|em|b|i|u|s|sub|sup|a|img)>"
)
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece spells bytes
_SPACE: Final = " \t\r\n\u2581"
_LETTER: Final = re.compile(r"\w")
_SYMBOL: Final = re.compile(r"[^\w\s]")


def add_named(tokenizer: TokenizerFile, named: Iterable[str]) -> None:
    """In place: what the model's files name and its vocabulary has is matched whole in text."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [
        AddedToken(token, special=True, normalized=False)
        for token in sorted(set(named) - added)
        if looks_like_control(token) and tokenizer.token_to_id(token) is not None
    ]
    if missing:
        tokenizer.add_special_tokens(missing)


def looks_like_control(token: str) -> bool:
    """Whether its spelling is that of a marker, such as `<tool_call>` or `[INST]`."""
    return _MARKER.fullmatch(token.strip(_SPACE)) is not None and not _BYTE.fullmatch(token)


class ControlTokens:
    """The control tokens of `tokenizer`: flagged special, named by the model's files, written by
    its chat template, or spelled like one.

    Space, and characters of the vocabulary, are text whatever is said of them.
    """

    def __init__(
        self, tokenizer: TokenizerFile, named: Collection[str], template_texts: Sequence[str]
    ) -> None:
        file = msgspec.json.decode(tokenizer.to_str())
        model = file["model"]
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        merged = {"".join(pair) for pair in model.get("merges") or ()}
        secret = secrets.token_hex(8)
        written = "\0".join(template_texts)
        self._tokens: dict[int, AddedToken] = {}
        self._spelling: dict[int, str] = {}
        hidden: dict[str, str] = {}
        for index, token in tokenizer.get_added_tokens_decoder().items():
            content = token.content
            is_marker = looks_like_control(content)
            if content in vocabulary and (
                len(content) == 1 or (content in merged and not token.special and not is_marker)
            ):
                continue  # text becomes it anyway
            used = content in named or (content.strip(_SPACE) != "" and content in written)
            if token.special or used or (is_marker and not _HTML.fullmatch(content)):
                self._tokens[index] = token
                hidden[content] = self._spelling[index] = f"<{secret}x{index}>"
        self._plain = _respelled(file, hidden)
        if any(self._plain.token_to_id(s) != index for index, s in self._spelling.items()):
            raise ValueError("its added tokens have ids that are not theirs")

    @property
    def ids(self) -> Collection[int]:
        return self._tokens.keys()

    def among(self, ids: Sequence[int]) -> list[int]:
        """The control tokens of `ids`, in order."""
        return [index for index in ids if index in self._tokens]

    def spelled(self, index: int) -> str:
        return self._tokens[index].content

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of text that no control token comes from."""
        return encode(self._plain, text, add_special_tokens=add_special_tokens)

    def encode_between(
        self, tokenizer: TokenizerFile, text: str, written: Sequence[tuple[int, int]]
    ) -> list[int]:
        """Token ids of text in which control tokens count, but for what `written` touches.

        These are (start, end), in order and apart. The rest is cut as if nothing were forged.
        """
        (encoding,) = tokenizer.encode_batch([_blanked(text, written)], add_special_tokens=False)
        starts = [start for start, _ in written]
        at, pieces = 0, []
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if index not in self._tokens:
                continue
            start, end = self._without_space(index, text, start, end)
            before = bisect_left(starts, end)
            if start >= at and not (before and start < written[before - 1][1]):
                pieces += [text[at:start], self._spelling[index]]
                at = end
        return self.encode("".join([*pieces, text[at:]]))

    def _without_space(self, index: int, text: str, start: int, end: int) -> tuple[int, int]:
        """Where a token stands, but for the space around it that it swallows."""
        token, found = self._tokens[index], text[start:end]
        left = len(found) - len(found.lstrip()) if token.lstrip else 0
        right = len(found) - len(found.rstrip()) if token.rstrip else 0
        return start + left, end - right


def encode(tokenizer: TokenizerFile, text: str, *, add_special_tokens: bool) -> list[int]:
    """The ids of a text. Unlike the library's `encode` this lets other threads run."""
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return encoding.ids


def _respelled(file: dict[str, Any], hidden: Mapping[str, str]) -> TokenizerFile:
    """The tokenizer in `file`, which is used up, with other spellings for some of its tokens."""
    for token in file["added_tokens"]:
        token["content"] = hidden.get(token["content"], token["content"])
    model = file["model"]
    tokens = dict(model["vocab"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(t, t): index for t, index in model["vocab"].items()}
    else:  # Unigram's pairs of a piece and its score
        model["vocab"] = [(hidden.get(t, t), score) for t, score in model["vocab"]]
    if touched := hidden.keys() & tokens:
        merges = model.get("merges") or []
        model["merges"] = [m for m in merges if touched.isdisjoint((*m, "".join(m)))]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    return TokenizerFile.from_str(msgspec.json.encode(file).decode())


def _blanked(text: str, written: Sequence[tuple[int, int]]) -> str:
    """The same with nothing to be read in those places, and words and space where they were."""
    at, pieces = 0, []
    for start, end in written:
        pieces += [text[at:start], _SYMBOL.sub(".", _LETTER.sub("x", text[start:end]))]
        at = end
    return "".join([*pieces, text[at:]])
