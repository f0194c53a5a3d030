"""In any split of a stream, the text and the stop strings are those of the whole."""

import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as TokenizerFile

from specserve.hub import resolve
from specserve.text import IncrementalDecoder, StopChecker, Tokenizer
from specserve.text.output_text import OutputText

START, END = 256, 257


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """Byte-level, one token per byte, and two control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    file = TokenizerFile(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    file.decoder = decoders.ByteLevel()
    file.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    file.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path)


def _stream(tokenizer: Tokenizer, ids: list[int], size: int) -> tuple[str, list[str]]:
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.feed(ids[i : i + size]) for i in range(0, len(ids), size)]
    return "".join([*pieces, decoder.flush()]), pieces


def _byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token per byte; the vocabulary is the byte alphabet."""
    vocabulary = tokenizer.vocabulary()
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = {byte: 256 + i for i, byte in enumerate(b for b in range(256) if b not in keep)}
    return [vocabulary[chr(moved.get(byte, byte))] for byte in data]


@pytest.mark.slow
def test_streamed_text_equals_the_whole() -> None:
    tokenizer = Tokenizer(resolve("smollm2-135m"))
    chance = random.Random(0)
    text = "def f(x): return 12  # 你好、世界 Привет नमस्ते 😀👩‍👩‍👧 e\u0301\n\n\t" * 9
    ids = tokenizer.encode(text)
    for size in (1, 2, 7, 50):
        assert _stream(tokenizer, ids, size)[0] == text
    noise = [chance.randrange(tokenizer.vocab_size) for _ in range(500)]
    for size in (1, 3):
        assert _stream(tokenizer, noise, size)[0] == tokenizer.decode(noise)


def test_incomplete_characters_are_held_back(tokenizer: Tokenizer) -> None:
    ids = _byte_ids(tokenizer, "a€😀b".encode())
    whole, pieces = _stream(tokenizer, ids, 1)
    assert whole == "a€😀b"
    assert pieces == ["a", "", "", "€", "", "", "", "😀", "b"]


def test_special_tokens_are_skipped(tokenizer: Tokenizer) -> None:
    euro = _byte_ids(tokenizer, "€".encode())
    assert _stream(tokenizer, [START, *euro[:2], END, euro[2], END], 1)[0] == "€"
    shown = IncrementalDecoder(tokenizer, skip_special=False)
    assert shown.feed([START, *euro]) == "<|im_start|>€"


def test_flush_returns_incomplete_characters(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    assert decoder.feed(_byte_ids(tokenizer, b"a\xe2\x82")) == "a"
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_any_bytes_in_any_split(tokenizer: Tokenizer) -> None:
    """For any bytes, the deltas join to the text of all bytes decoded at once."""
    chance = random.Random(1)
    alphabet = [*"aé€😀".encode(), 0xFF, 0x80, 0xE2, 0xF0]
    for _ in range(300):
        data = bytes(chance.choice(alphabet) for _ in range(chance.randrange(120)))
        ids = _byte_ids(tokenizer, data)
        assert _stream(tokenizer, ids, chance.choice([1, 2, 5, 200]))[0] == data.decode(
            errors="replace"
        )


def test_a_stop_string_across_deltas() -> None:
    checker = StopChecker(("END", "\n\n"))
    assert [checker.feed(piece) for piece in ("so E", "N", "", "D of")] == [None, None, None, 0]
    assert checker.feed(" it\n") is None
    assert checker.feed("\nx") == 1


def test_the_string_that_ends_first_wins_then_the_longest() -> None:
    assert StopChecker(("abcd", "bc")).feed("abcd") == 1
    assert StopChecker(("c", "abc", "bc")).feed("xabc") == 1


def test_overlapping_beginnings() -> None:
    assert StopChecker(("aab",)).feed("aaab") == 0
    assert StopChecker(("abab",)).feed("abaab") is None
    assert StopChecker(()).feed("anything") is None


@pytest.mark.parametrize(
    ("text", "held"),
    [("hello", 0), ("hello E", 1), ("hello EN", 2), ("hello ENx", 0), ("aEaEN", 2), ("", 0)],
)
def test_num_held(text: str, held: int) -> None:
    checker = StopChecker(("END", "NEVER"))
    checker.feed(text)
    assert checker.num_held == held


def test_long_stop_strings_take_linear_time(tokenizer: Tokenizer) -> None:
    """A text that nearly matches again and again is read only once."""
    count = 3000
    output = OutputText(tokenizer, ["a" * 1023 + end for end in "bcdefghijklmnopq"])
    (index,) = _byte_ids(tokenizer, b"a")
    started = time.process_time()
    pieces = [output.feed((index,)) for _ in range(count)]
    assert time.process_time() - started < 0.001 * count  # of CPU; reading it again takes 5 ms
    assert "".join(pieces) == "a" * (count - 1023)


letters = st.text("ab", max_size=12)


@given(
    text=letters, stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), data=st.data()
)
def test_stops_do_not_depend_on_the_split(text: str, stops: list[str], data: st.DataObject) -> None:
    whole = StopChecker(stops)
    found = whole.feed(text)
    assert (found is not None) == any(stop in text for stop in stops)
    if found is not None:
        ends = {stop: text.index(stop) + len(stop) for stop in stops if stop in text}
        assert ends[stops[found]] == min(ends.values())
    cut = data.draw(st.integers(0, len(text)))
    parts = StopChecker(stops)
    first = parts.feed(text[:cut])
    assert (parts.feed(text[cut:]) if first is None else first) == found
    longest = max(
        (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
    )
    assert whole.num_held == longest
