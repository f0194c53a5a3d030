"""Incremental decoding of token ids. How they are split into calls does not affect the text."""

from codecs import utf_8_decode
from collections.abc import Sequence

from specserve.text.tokenizer import Tokenizer

_MAX_CHAR_BYTES = 4  # of a UTF-8 character


class IncrementalDecoder:
    """Decodes a stream of ids to text; incomplete characters are held back.

    `prompt` has the ids before the stream. After a prompt, a space at the beginning of the stream
    is kept, and a character that the prompt begins is completed.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prompt: Sequence[int] = (), skip_special: bool = True
    ) -> None:
        self._detokenizer = tokenizer.detokenizer
        self._skipped = tokenizer.hidden_ids if skip_special else frozenset()
        self._pending = b""  # bytes of an incomplete character
        tail = b""
        for index in reversed(prompt):
            if index not in self._skipped:
                tail = self._detokenizer.bytes_of(index) + tail
            if len(tail) >= _MAX_CHAR_BYTES:
                break
        self._at_start = not tail  # whether the text has no bytes yet
        self._decode_complete(tail)

    def feed(self, ids: Sequence[int]) -> str:
        """Append `ids`; returns the text of all characters that are complete now."""
        shown = [index for index in ids if index not in self._skipped]
        data = self._detokenizer.join(shown, at_start=self._at_start)
        if self._at_start:
            self._at_start = not any(map(self._detokenizer.bytes_of, shown))
        return self._decode_complete(data)

    def flush(self) -> str:
        """The text of the bytes still held back, as U+FFFD; call it at the end."""
        text, self._pending = self._pending.decode(errors="replace"), b""
        return text

    def num_replacements_before(self, token_id: int) -> int:
        """The number of U+FFFD that appear before the text of `token_id` if it comes next.

        The bytes held back become U+FFFD unless the token continues their character.
        """
        data = self._detokenizer.bytes_of(token_id) if self._pending else b""
        if not data or token_id in self._skipped:
            return 0
        text, used = utf_8_decode(self._pending + data[:1], "replace", False)
        completes = len(text) == 1 and used > len(self._pending)
        return 0 if completes or not text else len(self._pending.decode(errors="replace"))

    def _decode_complete(self, data: bytes) -> str:
        data = self._pending + data
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text
