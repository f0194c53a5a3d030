"""Text is a function of the ids, for every tokenizer, any split and any prompt."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_tokenizers import ADDED, FAMILIES, write_tokenizer
from tokenizers import AddedToken, decoders, normalizers
from tokenizers import Tokenizer as TokenizerFile

from specserve.step import FinishInfo
from specserve.text import IncrementalDecoder, Tokenizer, TokenizerError
from specserve.text.detokenizer import byte_alphabet
from specserve.text.output_text import OutputText
from specserve.text.token_bytes import TokenBytes
from specserve.types import Request, SamplingParams
from specserve.verify.stopping import StopRule

UNKNOWN = 100_000  # an id that no tokenizer here has
LENGTH = FinishInfo("length")
WHOLE = ("中", "é", "🙂", "\n", " ", "กข", "a")
BROKEN = (b"\xf0\x9f", b"\xe4", b"\x99", b"\xc3", b"\xff", b"\xed\xa6", "\ufffd".encode())
CHARACTERS = {byte: character for character, byte in byte_alphabet().items()}


@cache
def pair(family: str) -> tuple[Tokenizer, TokenizerFile]:
    """Our tokenizer, and the file it was read from."""
    with TemporaryDirectory() as name:
        directory = write_tokenizer(Path(name), family)
        return Tokenizer(directory), TokenizerFile.from_file(str(directory / "tokenizer.json"))


@cache
def parts(family: str) -> list[list[int]]:
    """The ids that texts are made of: bytes of characters, parts of them, every token."""
    vocabulary = pair(family)[0].vocabulary()

    def in_bytes(data: bytes) -> list[int]:
        level = family.startswith("byte level")
        return [vocabulary[CHARACTERS[byte] if level else f"<0x{byte:02X}>"] for byte in data]

    written = [in_bytes(data) for data in (*(text.encode() for text in WHOLE), *BROKEN)]
    tokens = [[index] for index in vocabulary.values()]
    return [*written * 8, *[[vocabulary[token]] for token in ADDED] * 3, [UNKNOWN], *tokens]


@st.composite
def texts(draw: st.DrawFn, family: str = "") -> tuple[str, list[int]]:
    family = family or draw(st.sampled_from(list(FAMILIES)))
    drawn = draw(st.lists(st.sampled_from(parts(family)), max_size=20))
    return family, [index for part in drawn for index in part]


@st.composite
def cut(draw: st.DrawFn, ids: Sequence[int]) -> list[Sequence[int]]:
    """The ids in any split."""
    pieces, start = [], 0
    while start < len(ids):
        end = draw(st.integers(start + 1, min(start + 9, len(ids))))
        pieces.append(ids[start:end])
        start = end
    return pieces


def streamed(
    output: OutputText, pieces: Sequence[Sequence[int]], finish: FinishInfo = LENGTH
) -> list[str]:
    return [
        *(output.feed(piece) for piece in pieces[:-1]),
        output.feed(pieces[-1] if pieces else (), finish.reason, finish.stop_reason),
    ]


@given(texts(), st.booleans())
def test_decode_equals_the_library(text: tuple[str, list[int]], skip: bool) -> None:
    family, ids = text
    ours, theirs = pair(family)
    vocabulary = ours.vocabulary()
    rewritten = {vocabulary[token] for token in ADDED[2:]}
    ids = [index for index in ids if index not in rewritten]
    data = ours.detokenizer.join(ids, at_start=True)
    if family.startswith("byte level") or data.decode(errors="ignore").encode() == data:
        assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_added_token_decodes_to_its_content(family: str) -> None:
    tokenizer, _ = pair(family)
    vocabulary = tokenizer.vocabulary()
    separated = family in ("wordpiece", "no decoder")
    for token in ADDED:
        spelled = tokenizer.decode([vocabulary["x"], vocabulary[token], vocabulary["x"]])
        assert spelled == f"x {token} x" if separated else f"x{token}x", token


@pytest.mark.parametrize("known", [False, True])
def test_an_added_token_that_is_normalized(tmp_path: Path, known: bool) -> None:
    """As in fine-tunes of Llama 2: the normalizer puts a "▁" before the token."""
    directory = write_tokenizer(tmp_path, "sentencepiece", own=["<tool>"] * known)
    file = TokenizerFile.from_file(str(directory / "tokenizer.json"))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    file.normalizer = normalizers.Sequence(steps)
    file.add_tokens([AddedToken("<tool>", normalized=True)])
    file.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer(directory)
    x, tool = (tokenizer.vocabulary()[token] for token in ("x", "<tool>"))
    assert tokenizer.decode([x, tool, x]) == "x<tool>x"
    assert tokenizer.decode([tool, x]) == "<tool>x"
    assert TokenBytes(tokenizer).text(tool) == "<tool>"
    assert tool not in tokenizer.encode("x <tool>x")


def test_an_added_token_of_the_vocabulary_is_decoded_like_others(tmp_path: Path) -> None:
    """Adding "é" to a byte-level tokenizer gives the id of byte E9, a part of many characters."""
    added = {"Ġone": " one", "Ã©": "é", "<unk>": "<unk>", "café": "café", "õ": "õ", "!": "!"}
    own = ["café", "õ"]  # where no byte of UTF-8 is, as files are that keep all in one list
    directory = write_tokenizer(tmp_path, "byte level", added=[*added, "é"], own=own)
    tokenizer = Tokenizer(directory)
    vocabulary = tokenizer.vocabulary()
    for token, text in added.items():
        assert tokenizer.decode([vocabulary[token]]) == text
    assert tokenizer.detokenizer.bytes_of(vocabulary["é"]) == b"\xe9"
    spaces = Tokenizer(write_tokenizer(tmp_path, "sentencepiece", added=["▁▁", "<0x41>"]))
    ids = [spaces.vocabulary()[token] for token in ("x", "▁▁", "<0x41>")]
    assert spaces.decode(ids) == "x  A"


@given(texts(), st.booleans(), st.data())
def test_text_deltas_join_to_the_text(
    text: tuple[str, list[int]], skip: bool, data: st.DataObject
) -> None:
    family, ids = text
    tokenizer, _ = pair(family)
    pieces = data.draw(cut(ids))
    output = OutputText(tokenizer, skip_special=skip)
    whole = tokenizer.decode(ids, skip_special=skip)
    assert "".join(streamed(output, pieces)) == output.text == whole


@given(texts(), st.booleans(), st.data())
def test_prompt_and_answer_join_to_the_text_of_both(
    text: tuple[str, list[int]], skip: bool, data: st.DataObject
) -> None:
    family, ids = text
    tokenizer, _ = pair(family)
    at = data.draw(st.integers(0, len(ids)))
    echo = IncrementalDecoder(tokenizer, skip_special=skip).feed(ids[:at])
    answer = OutputText(tokenizer, prompt=ids[:at], skip_special=skip)
    streamed(answer, data.draw(cut(ids[at:])))
    assert echo + answer.text == tokenizer.decode(ids, skip_special=skip)


@given(texts(), st.booleans(), st.data())
def test_offsets_point_at_the_tokens(
    text: tuple[str, list[int]], skip: bool, data: st.DataObject
) -> None:
    family, ids = text
    tokenizer, _ = pair(family)
    shown = OutputText(tokenizer, prompt=[tokenizer.vocabulary()["x"]], skip_special=skip)
    offsets = []
    for piece in data.draw(cut(ids)):
        shown.feed(piece)
        offsets += shown.pop_final_offsets()
    shown.feed((), "length")
    assert len(offsets) == len(ids)
    assert offsets == sorted(offsets)
    for index, offset in zip(ids, offsets, strict=True):
        hidden = skip and index in tokenizer.hidden_ids
        own = b"" if hidden else tokenizer.detokenizer.bytes_of(index)
        if own and own.decode(errors="ignore").encode() == own:
            assert shown.text[offset:].startswith(own.decode())
        assert offset <= len(shown.text)


@given(texts(), st.booleans(), st.booleans(), st.integers(0, 3), st.data())
def test_stop_strings_are_searched_in_the_shown_text(
    text: tuple[str, list[int]], skip: bool, keep: bool, min_tokens: int, data: st.DataObject
) -> None:
    """The stopping rule and the text output find the same place, in any split."""
    family, ids = text
    tokenizer, _ = pair(family)
    prompt, ids = ids[:2], ids[2:] or [UNKNOWN]
    whole = OutputText(tokenizer, prompt=prompt, skip_special=skip)
    streamed(whole, [ids])
    start = data.draw(st.integers(0, max(0, len(whole.text) - 1)))
    length = data.draw(st.integers(1, 4))
    stops = tuple(stop for stop in (whole.text[start : start + length], "</s>", "never") if stop)
    params = SamplingParams(
        stop=stops,
        skip_special_tokens=skip,
        min_tokens=min_tokens,
        max_tokens=len(ids),
    )
    eos = tokenizer.vocabulary()["</s>"]
    rule = StopRule(Request("", tuple(prompt), params), [eos], tokenizer)
    finish: FinishInfo | None = None
    emitted: list[int] = []
    while finish is None:
        emitted.append(ids[len(emitted)])
        finish = rule.feed(emitted[-1])
    reason = finish.stop_reason
    shown = OutputText(tokenizer, stops, prompt=prompt, skip_special=skip, keep_stop=keep)
    pieces = streamed(shown, data.draw(cut(emitted)), finish)
    assert "".join(pieces) == shown.text
    without = OutputText(tokenizer, prompt=prompt, skip_special=skip)
    streamed(without, [emitted])
    if isinstance(reason, str):
        assert without.text.startswith(shown.text)
        assert shown.text.endswith(reason) if keep else without.text[len(shown.text) :]
    if min_tokens <= 1:
        kept = len(reason) if keep and isinstance(reason, str) else 0
        shorter = shown.text[: len(shown.text) - kept]
        assert not any(stop in shorter for stop in stops)
        assert isinstance(reason, str) == any(stop in without.text for stop in stops)
    assert len(shown.pop_final_offsets()) == len(emitted)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_names_are_unique(family: str) -> None:
    tokenizer, _ = pair(family)
    names = TokenBytes(tokenizer)
    ids = [*tokenizer.vocabulary().values(), UNKNOWN, UNKNOWN + 1]
    assert len({names.text(index) for index in ids}) == len(ids)
    for index in ids:
        name, data = names.text(index), names.bytes(index)
        if name.startswith("bytes:"):
            assert bytes.fromhex(name.removeprefix("bytes:").replace("\\x", "")) == data
        elif name.startswith("token_id:"):
            assert name == f"token_id:{index}"
        else:
            assert name.encode() == data


def test_of_equal_tokens_the_preferred_one_gets_the_name(tmp_path: Path) -> None:
    half = "bytes:\\xe4"
    added = ("one", "token_id:5", half, "bytes:")
    tokenizer = Tokenizer(write_tokenizer(tmp_path, "sentencepiece", added=added))
    vocabulary, names = tokenizer.vocabulary(), TokenBytes(tokenizer)
    spelled = {token: names.text(vocabulary[token]) for token in (*added, "A", "<0x41>", "▁one")}
    assert spelled == {
        "one": "one",
        "token_id:5": f"token_id:{vocabulary['token_id:5']}",
        half: f"token_id:{vocabulary[half]}",
        "bytes:": "bytes:",
        "A": "A",
        "<0x41>": f"token_id:{vocabulary['<0x41>']}",
        "▁one": " one",
    }
    assert names.text(UNKNOWN) == f"token_id:{UNKNOWN}"


def test_a_named_end_token_has_no_text(tmp_path: Path) -> None:
    """Nor has any other token that ended the answer; inside an answer it is text."""
    directory = write_tokenizer(
        tmp_path, "byte level", added=("<|end|>", "<think>"), eos_token="<|end|>"
    )
    tokenizer = Tokenizer(directory)
    vocabulary = tokenizer.vocabulary()
    end, think = vocabulary["<|end|>"], vocabulary["<think>"]
    assert tokenizer.decode([end, think, end]) == "<think>"
    assert tokenizer.decode([end, think], skip_special=False) == "<|end|><think>"
    assert OutputText(tokenizer).feed([think, think], "stop") == "<think>"
    assert OutputText(tokenizer).feed([think, think], "length") == "<think><think>"
    shown = OutputText(tokenizer, skip_special=False)
    assert shown.feed([think, think], "stop") == "<think><think>"


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (decoders.CTC(), "CTC"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), "Replace"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]), "Strip"),
        (decoders.Sequence([decoders.Replace("a", "b"), decoders.ByteLevel()]), "ByteLevel"),
        (decoders.Strip(" ", 1, 1), "Strip"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip("x", 2, 1)]), "Strip"),
    ],
)
def test_a_decoder_that_depends_on_other_tokens_or_panics_is_refused(
    tmp_path: Path, decoder: decoders.Decoder, named: str
) -> None:
    directory = write_tokenizer(tmp_path, "metaspace")
    file = TokenizerFile.from_file(str(directory / "tokenizer.json"))
    file.decoder = decoder
    file.save(str(directory / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json: its decoder .*because of {named}"):
        Tokenizer(directory)


def test_token_bytes_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _ = pair("sentencepiece")
    read: list[int] = []
    real = tokenizer.detokenizer._compute_bytes

    def counting(token_id: int) -> bytes:
        read.append(token_id)
        return real(token_id)

    monkeypatch.setattr(tokenizer.detokenizer, "_compute_bytes", counting)
    output = OutputText(tokenizer, ["never"])
    for _ in range(50):
        output.feed([UNKNOWN + 7, UNKNOWN + 8])
    assert read == [UNKNOWN + 7, UNKNOWN + 8]
