"""Reading the top level of a body as Go's decoder would, and where its values stand."""

import json
import re
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from router.core.peek import Unreadable, text, top_level

READABLE: dict[str, tuple[bytes, dict[str, bytes]]] = {
    "empty object": (b"{}", {}),
    "empty object with blanks": (b" {\t\r\n} ", {}),
    "one string": (b'{"model":"m"}', {"model": b'"m"'}),
    "blanks everywhere": (b' {\n"a" :\t1\r\n, "b": 2 }', {"a": b"1", "b": b"2"}),
    "every scalar": (
        b'{"a":-1.5e+3,"b":true,"c":false,"d":null,"e":0,"f":""}',
        {"a": b"-1.5e+3", "b": b"true", "c": b"false", "d": b"null", "e": b"0", "f": b'""'},
    ),
    "a nested model is not the model": (
        b'{"messages":[{"model":"inner"}],"model":"outer"}',
        {"messages": b'[{"model":"inner"}]', "model": b'"outer"'},
    ),
    "case of a key does not matter": (b'{"MoDeL":"m"}', {"model": b'"m"'}),
    "the last of equal keys": (b'{"model":"a","model":"b"}', {"model": b'"b"'}),
    "the last whatever its case": (
        b'{"model":"a","stream":true,"MODEL":"b","Stream":false}',
        {"model": b'"b"', "stream": b"false"},
    ),
    "an escaped key": (b'{"\\u006dodel":"m"}', {"model": b'"m"'}),
    "Go folds the Kelvin sign": ('{"\u212aey":1}'.encode(), {"key": b"1"}),
    "bytes behind the object": (b'{"a":1}{"a":2} junk \xff', {"a": b"1"}),
    "brackets in strings": (
        b'{"a":["]}",{"b":"{[\\"]"}],"c":1}',
        {"a": b'["]}",{"b":"{[\\"]"}]', "c": b"1"},
    ),
    "escaped quotes and back slashes": (
        rb'{"a":"\"","b":"\\","c":"\\\"","d":"\\\\"}',
        {"a": rb'"\""', "b": rb'"\\"', "c": rb'"\\\""', "d": rb'"\\\\"'},
    ),
    "invalid UTF-8 in a string": (b'{"a":"\xff\xc3","b":1}', {"a": b'"\xff\xc3"', "b": b"1"}),
    "invalid UTF-8 before the end of a string": (
        b'{"a":"\xe2","b":1}',
        {"a": b'"\xe2"', "b": b"1"},
    ),
    "a lone surrogate": (rb'{"a":"\ud800","b":1}', {"a": rb'"\ud800"', "b": b"1"}),
    "an empty key": (b'{"":1}', {"": b"1"}),
}

UNREADABLE = {
    "nothing": b"",
    "blanks": b" \n",
    "a byte order mark": b'\xef\xbb\xbf{"model":"m"}',
    "UTF-16": '{"model":"m"}'.encode("utf-16-le"),
    "a NUL first": b'\0{"model":"m"}',
    "a form feed is no blank": b'\f{"model":"m"}',
    "array": b'[{"model":"m"}]',
    "string": b'"model"',
    "number": b"1",
    "null": b"null",
    "text": b"model=m",
    "multipart": b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n',
    "gzip": b"\x1f\x8b\x08\0",
    "zstd": b"\x28\xb5\x2f\xfd",
    "only a brace": b"{",
    "an unfinished key": b'{"model',
    "a key and no more": b'{"model"',
    "a key without a value": b'{"model":',
    "a key with nothing for a value": b'{"model":}',
    "no colon": b'{"model" "m"}',
    "an equals sign": b'{"model"="m"}',
    "a bare key": b'{model:"m"}',
    "single quotes": b"{'model':'m'}",
    "a key that is a number": b'{1:"m"}',
    "a malformed escape in a key": b'{"\\x6dodel":"m"}',
    "a newline in a key": b'{"mo\ndel":"m"}',
    "an unfinished string": b'{"model":"m',
    "a string whose end is escaped": b'{"model":"m\\"}',
    "an unfinished array": b'{"a":[1,2',
    "an unfinished object": b'{"a":{"b":{}',
    "a bracket closed in a string only": b'{"a":["]"',
    "an unfinished string in an array": b'{"a":["b]}',
    "no comma": b'{"a":1 "b":2}',
    "two commas": b'{"a":1,,"b":2}',
    "a comma at the end": b'{"a":1,}',
    "a comma first": b'{,"a":1}',
    "no closing brace": b'{"a":1',
    "a square end": b'{"a":1]',
    "a bare word": b'{"a":yes}',
    "a word that goes on": b'{"a":truest}',
    "a capital word": b'{"a":True}',
    "not a number": b'{"a":NaN}',
    "a minus sign": b'{"a":-}',
    "a plus sign": b'{"a":+1}',
    "a comment": b'{/**/"a":1}',
}


def values(body: bytes | bytearray) -> dict[str, bytes]:
    return {key: bytes(body[start:end]) for key, (start, end) in top_level(body).items()}


@pytest.mark.parametrize(("body", "expected"), READABLE.values(), ids=READABLE)
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_what_ollama_accepts_is_read(
    body: bytes, expected: dict[str, bytes], kind: type[bytes | bytearray]
) -> None:
    assert values(kind(body)) == expected


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_what_is_no_object_is_unreadable(body: bytes, kind: type[bytes | bytearray]) -> None:
    with pytest.raises(Unreadable):
        top_level(kind(body))


def test_the_mistake_tells_no_byte_of_the_body() -> None:
    with pytest.raises(Unreadable) as caught:
        top_level(b'{"hush":"secret')
    assert not re.search("hush|secret", repr(caught.value))
    with pytest.raises(Unreadable) as caught:
        text(b'"secret\\x"', (0, 10))
    assert "secret" not in repr(caught.value)
    assert caught.value.__suppress_context__


def test_nesting_as_deep_as_go_reads_it_is_read_without_recursion() -> None:
    inner = 10_000 - 1
    value = b'[{"a":' * (inner // 2) + b"[" * (inner % 2) + b"0"
    value += b"]" * (inner % 2) + b"}]" * (inner // 2)
    assert values(b'{"deep":' + value + b"}") == {"deep": value}


@pytest.mark.parametrize("inner", [10_000, 10_001, 1_000_000])
def test_deeper_nesting_is_unreadable(inner: int) -> None:
    with pytest.raises(Unreadable):
        top_level(b'{"deep":' + b"[" * inner + b"]" * inner + b"}")


TEXTS: dict[str, tuple[bytes, str]] = {
    "plain": (b'"llama3:8b"', "llama3:8b"),
    "empty": (b'""', ""),
    "blanks stay": (b'" m "', " m "),
    "escaped": (rb'"\u006d\/\n\"\\"', 'm/\n"\\'),
    "an escaped pin": (rb'"m\u0040gpu-1"', "m@gpu-1"),
    "two surrogates": (rb'"\ud83d\ude00"', "\U0001f600"),
    "a lone high surrogate": (rb'"a\ud800b"', "a\ufffdb"),
    "a lone low surrogate": (rb'"\udc00"', "\ufffd"),
    "surrogates in the wrong order": (rb'"\ude00\ud83d"', "\ufffd\ufffd"),
    "invalid UTF-8": (b'"a\xffb"', "a\ufffdb"),
    "UTF-8": ('"é\u2028"'.encode(), "é\u2028"),
}

NO_TEXTS = {
    "number": b"1",
    "null": b"null",
    "array": b'["m"]',
    "nothing": b"",
    "an unknown escape": b'"\\x"',
    "half an escape": b'"\\u12"',
    "a control character": b'"a\nb"',
    "unfinished": b'"a',
}


@pytest.mark.parametrize(("raw", "expected"), TEXTS.values(), ids=TEXTS)
def test_text_of_a_string(raw: bytes, expected: str) -> None:
    body = b'{"model":' + raw + b"}"
    assert text(body, top_level(body)["model"]) == expected


@pytest.mark.parametrize("raw", NO_TEXTS.values(), ids=NO_TEXTS)
def test_what_is_no_string_has_no_text(raw: bytes) -> None:
    with pytest.raises(Unreadable):
        text(raw, (0, len(raw)))


class Pairs(list[tuple[str, object]]):
    """The reference reading: pairs as they stand, equal keys and all."""


def go_fold(key: str) -> str:
    """Go's decoder folds ASCII letters and the two other characters that fold to one."""
    return key.translate({0x17F: "s", 0x212A: "k"}).lower()


def reference(body: bytes) -> dict[str, object]:
    pairs = json.loads(body, object_pairs_hook=Pairs)
    assert isinstance(pairs, Pairs)
    return {go_fold(key): value for key, value in pairs}


@dataclass(frozen=True)
class Written:
    """A valid body, and the text of each value by its key in lower case."""

    body: bytes
    raw: dict[str, bytes]


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.text('"\\{}[],: '),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
_KEYS = st.sampled_from(["model", "Model", "MODEL", "name", "stream", "STREAM", 'a"b', "\\"]) | (
    st.text(max_size=6)
)
_BLANKS = st.text(" \t\r\n", max_size=2)


@st.composite
def bodies(draw: st.DrawFn) -> Written:
    ascii_only = draw(st.booleans())
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:\r")]))
    parts, raw = [], {}
    for key, value in draw(st.lists(st.tuples(_KEYS, _JSON), max_size=6)):
        shown = json.dumps(value, ensure_ascii=ascii_only, separators=separators)
        name = json.dumps(key, ensure_ascii=ascii_only)
        parts.append(f"{draw(_BLANKS)}{name}{draw(_BLANKS)}:{draw(_BLANKS)}{shown}{draw(_BLANKS)}")
        raw[go_fold(key)] = shown.encode()
    return Written(f"{draw(_BLANKS)}{{{','.join(parts)}}}".encode(), raw)


@given(bodies())
def test_valid_json_reads_as_the_reference_does(written: Written) -> None:
    found = values(written.body)
    assert found == written.raw
    read = {key: json.loads(raw, object_pairs_hook=Pairs) for key, raw in found.items()}
    assert read == (reference(written.body) if found else {})


@given(bodies())
def test_text_reads_as_the_reference_does(written: Written) -> None:
    spans = top_level(written.body)
    wanted = reference(written.body) if spans else {}
    for key, value in wanted.items():
        if isinstance(value, str):
            assert text(written.body, spans[key]) == value
        else:
            with pytest.raises(Unreadable):
                text(written.body, spans[key])


@given(bodies(), st.binary())
def test_bytes_behind_the_object_change_nothing(written: Written, behind: bytes) -> None:
    assert top_level(written.body + behind) == top_level(written.body)


@given(bodies(), st.data())
def test_a_body_that_was_cut_is_unreadable(written: Written, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(written.body) - 1))
    with pytest.raises(Unreadable):
        top_level(written.body[:cut])


def check_any(body: bytes) -> None:
    try:
        spans = top_level(body)
    except Unreadable:
        return
    for start, end in spans.values():
        assert 0 < start < end < len(body)
        assert not body[start : start + 1].isspace()
        assert not body[end - 1 : end].isspace()
        try:
            value = text(body, (start, end))
        except Unreadable:
            continue
        assert value.encode().decode() == value


@given(st.binary() | st.text('{}[]":,\\u d8 09-.eEtrufalsn\n\ufffd').map(str.encode))
@example(b'{"a":[}')
@example(b'{"a":[}}')
@example(b'{"\\ud800":"\\udfff"}')
@example(b'{"a":"\\')
@example(b'{"a":1e999999999999}')
def test_any_bytes_give_spans_or_unreadable(body: bytes) -> None:
    check_any(body)


@given(bodies(), st.data())
def test_a_damaged_body_gives_spans_or_unreadable(written: Written, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(written.body)))
    gone = data.draw(st.integers(0, 3))
    put = data.draw(st.binary(max_size=3) | st.sampled_from([b'"', b"\\", b"{", b"]", b","]))
    check_any(written.body[:at] + put + written.body[at + gone :])
