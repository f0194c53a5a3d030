"""What one token stands for by itself: its bytes, and how logprobs spell it."""

from specserve.text.tokenizer import Tokenizer

_ID, _BYTE = "token_id:", "bytes:\\x"


class TokenBytes:
    """Bytes of single tokens, and a name for each that no other has.

    A name is the token's text, `bytes:\\xe2\\x80` if that is no whole character, and `token_id:7`
    if the tokenizer has no such token, or names it as it does another.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizer = tokenizer.detokenizer
        self._alike = self._find_alike(tokenizer.vocabulary())
        self.bytes = self._detokenizer.bytes_of

    def text(self, token_id: int) -> str:
        """The token's name."""
        data = self.bytes(token_id)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        else:
            if text.startswith((_ID, _BYTE)):  # it reads like a name of the other kinds
                text = ""
        return text if text and token_id not in self._alike else f"{_ID}{token_id}"

    def _find_alike(self, vocabulary: dict[str, int]) -> frozenset[int]:
        """Tokens whose bytes another token has by better right: one that is no single byte by
        its name, else the one with the lower id."""
        spell, is_byte = self._detokenizer.spell, self._detokenizer.is_byte
        owners: dict[bytes, int] = {}
        alike = []
        ranked = [(is_byte(index, token), index, token) for token, index in vocabulary.items()]
        for _, index, token in sorted(ranked):
            if owners.setdefault(spell(index, token), index) != index:
                alike.append(index)
        return frozenset(alike)
