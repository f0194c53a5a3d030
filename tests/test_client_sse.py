"""Server-sent events: no cut in the bytes changes what is read."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from specserve.client.sse import SSEDecoder

LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=8)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])
FIELDS = st.one_of(
    LINES.map(lambda value: f"data: {value}"),
    LINES.map(lambda value: f"data:{value}"),
    LINES.map(lambda value: f": {value}"),
    st.sampled_from(["", "", "data", "event: x", "id", "retry: 3", "data: [DONE]", "dat: no"]),
)


def feed_all(pieces: list[bytes]) -> list[str]:
    decoder = SSEDecoder()
    return [event.decode() for piece in pieces for event in decoder.feed(piece)]


def expected_events(lines: list[str]) -> list[str]:
    """The standard's rules, line by line."""
    events: list[str] = []
    data: list[str] = []
    for line in lines:
        name, _, value = line.partition(":")
        if line == "" and data:
            events.append("\n".join(data))
            data = []
        elif name == "data":
            data.append(value[1:] if value.startswith(" ") else value)
    return events


@given(st.lists(st.tuples(FIELDS, ENDS), max_size=12), st.lists(st.integers(0, 200), max_size=12))
def test_events_do_not_depend_on_how_the_bytes_are_cut(
    lines: list[tuple[str, str]], places: list[int]
) -> None:
    # CR then LF is one line end, so what follows a CR must not be an empty line ending in LF.
    lines = [
        (line, "\n" if end == "\r" and follower == ("", "\n") else end)
        for (line, end), follower in zip(lines, [*lines[1:], ("", "")], strict=False)
    ]
    stream = "".join(line + end for line, end in lines).encode()
    cuts = sorted({0, len(stream), *(place for place in places if place < len(stream))})
    pieces = [stream[a:b] for a, b in pairwise(cuts)]
    expected = expected_events([line for line, _ in lines])
    assert feed_all(pieces) == expected
    assert feed_all([bytes([byte]) for byte in stream]) == expected


@given(st.lists(LINES.map(lambda line: line + "\n" + line), max_size=4), st.integers(1, 7))
def test_what_is_written_is_what_is_read(texts: list[str], size: int) -> None:
    stream = b"\xef\xbb\xbf" + b"".join(
        b"".join(b"data: %b\r\n" % line for line in text.encode().split(b"\n")) + b"\r\n"
        for text in texts
    )
    assert feed_all([stream[at : at + size] for at in range(0, len(stream), size)]) == texts


def test_an_event_without_its_empty_line_does_not_count() -> None:
    assert feed_all([b"data: whole\n\ndata: half\n"]) == ["whole"]
