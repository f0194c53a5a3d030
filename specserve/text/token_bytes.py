"""What one token stands for by itself: its bytes, and how logprobs spell it."""

from functools import lru_cache

from specserve.text.tokenizer import Tokenizer


class TokenBytes:
    """Bytes of single tokens: half a character has bytes, but no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spelling = {index: token for token, index in tokenizer.vocabulary().items()}
        alphabet = byte_alphabet()
        spelled = (t for i, t in self._spelling.items() if i not in tokenizer.special_ids)
        self._alphabet = alphabet if all(set(t) <= alphabet.keys() for t in spelled) else None
        self.bytes = lru_cache(maxsize=2**14)(self._bytes)

    def text(self, token_id: int) -> str:
        """Its text, or `bytes:\\xe2\\x80` if it is no whole character. Never the same for two."""
        data = self.bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes(self, token_id: int) -> bytes:
        spelling = self._spelling.get(token_id)
        if spelling is None or token_id in self._tokenizer.special_ids:
            return (spelling or "").encode()
        if self._alphabet is not None:
            return bytes(self._alphabet[character] for character in spelling)
        if len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
            return bytes.fromhex(spelling[3:5])
        return self._tokenizer.decode([token_id], skip_special=False).encode()


def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE spells bytes with: printable ones stand for themselves,
    the others come after U+0100, in order (Radford et al. 2019)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + rank): byte for rank, byte in enumerate(others)}
