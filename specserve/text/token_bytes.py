"""The bytes of single tokens, and their names in logprobs."""

from functools import lru_cache

from specserve.text.tokenizer import Tokenizer

_ID, _BYTE = "token_id:", "bytes:\\x"


class TokenBytes:
    """The bytes and a unique name of each token.

    The name is the token's text; `bytes:\\xe2\\x80` if its bytes are not whole characters; and
    `token_id:7` if the tokenizer has no such token, if another token with the same bytes is
    preferred (`Detokenizer.preferred_id`), or if the text looks like one of these other names.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizer = tokenizer.detokenizer
        self.bytes = tokenizer.detokenizer.bytes_of
        self.text = lru_cache(maxsize=2**14)(self._text)

    def _text(self, token_id: int) -> str:
        data = self.bytes(token_id)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        else:
            if text.startswith((_ID, _BYTE)):  # it could be mistaken for the other kinds of names
                text = ""
        preferred = self._detokenizer.preferred_id(data) == token_id
        return text if text and preferred else f"{_ID}{token_id}"
