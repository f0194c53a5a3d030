"""Maps each token id to its bytes, and token ids to text.

Text is a function of the ids alone: the concatenated bytes of the tokens, decoded as UTF-8. A token
has the same bytes at every position, except that many tokenizers drop a space at the beginning of
the text.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer as TokenizerFile

_PRECEDING: Final = "a"  # decoded in front of a token, to get its text after other tokens
_NOT_UTF8: Final = bytes([0xC0, 0xC1, *range(0xF5, 0x100)])  # bytes that do not occur in UTF-8
_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SUPPORTED: Final = "ByteLevel, Metaspace, WordPiece, or a Sequence of Replace, ByteFallback, Fuse"
Step = dict[str, Any]  # a decoder as in tokenizer.json


class Detokenizer:
    """Decodes token ids as the decoder of a tokenizer file does.

    An added token that is not in the model's own vocabulary stands for its literal content, without
    the replacements and byte mappings of the decoder. One that is in both is decoded like the
    model's other tokens, so "é" of a byte-level model is byte E9; if that gives neither UTF-8 text
    nor a byte that occurs in UTF-8, it stands for its literal content, too.

    Raises ValueError for a decoder with unsupported steps, or in which the bytes of a token depend
    on other tokens.
    """

    def __init__(self, file: TokenizerFile) -> None:
        steps: list[Step] = []
        if file.decoder is not None:
            steps = _flat(msgspec.json.decode(file.decoder.__getstate__()))
        _check_steps(steps)
        self._file, self._model, self._decoder = file, file.model, file.decoder
        self._added = {i: token.content for i, token in file.get_added_tokens_decoder().items()}
        kinds = {step["type"] for step in steps}
        self._byte_fallback = "ByteFallback" in kinds
        self._rewrites = bool(kinds & {"Replace", "Metaspace", "ByteFallback"})
        self._alphabet = byte_alphabet() if "ByteLevel" in kinds else None
        self._characters = {byte: character for character, byte in byte_alphabet().items()}
        self._replacements = _replacements(steps)
        self._cache: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token that follows other text; empty if there is no such token."""
        data = self._cache.get(token_id)
        if data is None:
            data = self._cache[token_id] = self._compute_bytes(token_id)
        return data

    def preferred_id(self, data: bytes) -> int | None:
        """The id of the preferred token with exactly these bytes, or None.

        Several tokens may have the same bytes. A byte token such as `<0x41>` is preferred least.
        """
        text = data.decode(errors="replace")
        spellings = [text, text.removeprefix(" "), f"##{text}"]
        if self._alphabet is not None:
            spellings.insert(0, "".join(map(self._characters.__getitem__, data)))
        for old, new in reversed(self._replacements or ()):
            spellings.insert(0, spellings[0].replace(new, old))
        if len(data) == 1:
            spellings += [f"<0x{data[0]:02X}>", f"<0x{data[0]:02x}>"]
        ids = map(self._file.token_to_id, spellings)
        return next((i for i in ids if i is not None and self.bytes_of(i) == data), None)

    def join(self, ids: Sequence[int], *, at_start: bool) -> bytes:
        """The concatenated bytes of `ids`. `at_start`: they are at the beginning of the text."""
        data = list(map(self.bytes_of, ids))
        if at_start:
            first = next((i for i, each in enumerate(data) if each), None)
            if first is not None:
                data[first] = self._bytes_at_start(ids[first], data[first])
        return b"".join(data)

    def text(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        return self.join(list(ids), at_start=True).decode(errors="replace")

    def _compute_bytes(self, token_id: int) -> bytes:
        spelling = self._spelling(token_id)
        if spelling is None:
            return b""
        if self._alphabet is not None:
            return self._from_alphabet(token_id, spelling)
        if self._is_byte_token(token_id, spelling):
            return bytes.fromhex(spelling[3:5])
        literal = self._is_literal(token_id, spelling)
        return (spelling if literal else self._text_inside(spelling)).encode()

    def _bytes_at_start(self, token_id: int, elsewhere: bytes) -> bytes:
        spelling = self._spelling(token_id)
        if spelling is None or self._alphabet is not None or self._is_literal(token_id, spelling):
            return elsewhere
        if not elsewhere.isascii() and self._is_byte_token(token_id, spelling):
            return elsewhere
        return self._decode([spelling]).encode()

    def _spelling(self, token_id: int) -> str | None:
        """The token as in the file; the library may return added tokens in normalised form."""
        return self._added.get(token_id) or self._file.id_to_token(token_id)

    def _is_added_only(self, token_id: int, spelling: str) -> bool:
        """Whether this is an added token that is not in the model's vocabulary."""
        return token_id in self._added and self._model.token_to_id(spelling) != token_id

    def _is_byte_token(self, token_id: int, spelling: str) -> bool:
        """Whether this is a byte token, such as `<0x0A>`."""
        return (
            self._byte_fallback
            and _BYTE.fullmatch(spelling) is not None
            and not self._is_added_only(token_id, spelling)
        )

    def _is_literal(self, token_id: int, spelling: str) -> bool:
        """Whether this is an added token whose literal content the decoder would change."""
        return (
            self._rewrites
            and self._is_added_only(token_id, spelling)
            and (_BYTE.fullmatch(spelling) is not None or self._text_inside(spelling) != spelling)
        )

    def _from_alphabet(self, token_id: int, spelling: str) -> bytes:
        assert self._alphabet is not None
        try:
            data = bytes(map(self._alphabet.__getitem__, spelling))
        except KeyError:  # not in the byte alphabet: literal, as in the library's decoder
            return spelling.encode()
        if token_id not in self._added:
            return data
        text = data.decode(errors="ignore").encode() == data
        byte = len(data) == 1 and data not in _NOT_UTF8
        literal = self._is_added_only(token_id, spelling) or not (text or byte)
        return spelling.encode() if literal else data

    def _text_inside(self, spelling: str) -> str:
        """The text of a token that follows other tokens."""
        if self._replacements is None:
            return self._decode([_PRECEDING, spelling]).removeprefix(self._decode([_PRECEDING]))
        for old, new in self._replacements:
            spelling = spelling.replace(old, new)
        return spelling

    def _decode(self, tokens: list[str]) -> str:
        if self._decoder is None:
            return " ".join(tokens)
        text: str = self._decoder.decode(tokens)
        return text


def byte_alphabet() -> dict[str, int]:
    """The byte for each character of the alphabet of byte-level BPE (Radford et al. 2019).

    Printable bytes have their own character; the others have U+0100 and up, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def _flat(step: Step) -> list[Step]:
    """The steps of a decoder in order; those of sequences one by one."""
    if step["type"] != "Sequence":
        return [step]
    return [inner for each in step["decoders"] for inner in _flat(each)]


def _check_steps(steps: list[Step]) -> None:
    """Raise ValueError unless every step depends on one token or the beginning of the text."""
    kinds = [step["type"] for step in steps]
    per_token = {"Replace", "Metaspace", "WordPiece", "ByteFallback", "Strip", "ByteLevel"}
    fused = False
    for number, step in enumerate(steps):
        kind = step["type"]
        supported = kind in per_token and not fused
        if kind == "Replace" and fused:  # a single character cannot span tokens
            supported = len(step["pattern"].get("String", "")) == 1
        if kind == "Strip" and (fused or "ByteFallback" in kinds[:number]):
            supported = fused and step["start"] <= 1 and step["stop"] == 0
        if kind == "Strip" and step["start"] and step["stop"]:
            supported = False  # the library panics at a token that is just one such character
        if kind == "ByteLevel":
            supported = supported and set(kinds) <= {"ByteLevel", "Fuse"}
        if not (supported or kind == "Fuse"):
            raise ValueError(
                f"its decoder ({' '.join(kinds)}) does not spell tokens one by one, because of "
                f"{kind}; supported: {_SUPPORTED} and a Strip of one space at the beginning"
            )
        fused = fused or kind in ("Fuse", "ByteLevel")


def _replacements(steps: list[Step]) -> list[tuple[str, str]] | None:
    """Pairs (old, new) if a token after others is only changed by replacements; else None."""
    pairs, fused = [], False
    for step in steps:
        fused = fused or step["type"] == "Fuse"
        if step["type"] == "Replace" and "String" in step["pattern"]:
            pairs.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            pairs.append((step["replacement"], " "))
        elif step["type"] not in ("ByteFallback", "Fuse") and not fused:
            return None
    return pairs if steps else None
