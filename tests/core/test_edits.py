"""Asking a node for token counts: the option is there, and no other byte has moved."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import dialect
from router.core.dialect import Call
from router.core.edits import Splice, ask_usage, spliced

CHAT = dialect.find("/v1/chat/completions")
assert CHAT is not None
ASKED = b'"stream_options":{"include_usage":true}'


def call(body: bytes | bytearray, path: str = "/v1/chat/completions") -> Call:
    route = dialect.find(path)
    assert route is not None
    return dialect.parse(route, body, exact_usage=True)


def asked(body: bytes | bytearray) -> bytes:
    """The body as a node gets it where the model's name stays."""
    made = call(body)
    return b"".join(dialect.rename(body, made, made.model))


EDITED: dict[str, tuple[bytes, bytes]] = {
    "nothing is said of it": (
        b'{"model":"m","stream":true}',
        b'{"model":"m","stream":true,' + ASKED + b"}",
    ),
    "blanks at the end": (
        b' {"stream" : true \t}\r\n',
        b' {"stream" : true,' + ASKED + b" \t}\r\n",
    ),
    "the same words deeper and in text": (
        b'{"a":[{"stream_options":1}],"b":"\\"stream_options\\":","stream":true}',
        b'{"a":[{"stream_options":1}],"b":"\\"stream_options\\":","stream":true,' + ASKED + b"}",
    ),
    "null": (
        b'{"stream_options": null ,"stream":true}',
        b'{"stream_options": {"include_usage":true} ,"stream":true}',
    ),
    "empty": (
        b'{"stream_options":{ },"stream":true}',
        b'{"stream_options":{"include_usage":true },"stream":true}',
    ),
    "another option": (
        b'{"stream_options":{"x":{"include_usage":1} },"stream":true}',
        b'{"stream_options":{"x":{"include_usage":1},"include_usage":true },"stream":true}',
    ),
    "refused": (
        b'{"stream":true,"stream_options":{"include_usage" : false}}',
        b'{"stream":true,"stream_options":{"include_usage" : true}}',
    ),
    "refused with null": (
        b'{"stream":true,"stream_options":{"a":1,"include_usage":null,"b":2}}',
        b'{"stream":true,"stream_options":{"a":1,"include_usage":true,"b":2}}',
    ),
    "keys as Go matches them": (
        b'{"stream":true,"Stream\\u005fOptions":{"INCLUDE_USAGE":false}}',
        b'{"stream":true,"Stream\\u005fOptions":{"INCLUDE_USAGE":true}}',
    ),
    "a long s": (
        '{"stream":true,"\u017ftream_options":null}'.encode(),
        '{"stream":true,"\u017ftream_options":{"include_usage":true}}'.encode(),
    ),
    "something behind the object": (
        b'{"stream":true}{"stream_options":1}',
        b'{"stream":true,' + ASKED + b'}{"stream_options":1}',
    ),
    "invalid UTF-8": (
        b'{"a":"\xff","stream":true}',
        b'{"a":"\xff","stream":true,' + ASKED + b"}",
    ),
    "a large body": (
        b'{"a":"%b","stream":true }' % (b"x" * 300_000),
        b'{"a":"%b","stream":true,%b }' % (b"x" * 300_000, ASKED),
    ),
}


@pytest.mark.parametrize(("body", "expected"), EDITED.values(), ids=EDITED)
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_stream_is_asked_for_its_token_counts(
    body: bytes, expected: bytes, kind: type[bytes | bytearray]
) -> None:
    assert asked(kind(body)) == expected
    assert asked(expected) == expected, "once is enough"


LEFT = {
    "not a stream": b'{"model":"m"}',
    "not a stream, said": b'{"model":"m","stream":false,"stream_options":null}',
    "no object": b"[]",
    "empty": b"{}",
    "cut": b'{"stream":true,',
    "asked already": b'{"stream":true,"stream_options":{"include_usage":true}}',
    "asked twice": b'{"stream":true,"stream_options":null,"stream_options":null}',
    "asked in two spellings": b'{"stream":true,"stream_options":{},"STREAM_OPTIONS":null}',
    "flagged twice": (
        b'{"stream":true,"stream_options":{"include_usage":false,"Include_Usage":null}}'
    ),
    "a number": b'{"stream":true,"stream_options":{"include_usage":0}}',
    "a text": b'{"stream":true,"stream_options":"include_usage"}',
    "a list": b'{"stream":true,"stream_options":[{"include_usage":false}]}',
}


@pytest.mark.parametrize("body", LEFT.values(), ids=LEFT)
def test_what_needs_no_edit_or_is_too_odd_for_one_is_left_alone(body: bytes) -> None:
    assert call(body).usage is None
    assert asked(body) == body


def test_an_object_without_keys_is_no_stream_and_left_alone() -> None:
    assert ask_usage(b" { } ") is None


@pytest.mark.parametrize("path", ["/api/chat", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_other_endpoints_are_never_edited(path: str) -> None:
    assert call(b'{"model":"m","stream":true}', path).usage is None


def test_nobody_is_asked_where_estimates_are_enough() -> None:
    assert CHAT is not None
    assert dialect.parse(CHAT, b'{"stream":true}').usage is None


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m@n","stream":true}',
        b'{"stream":true,"model":"m@n"}',
        b'{"model":"m@n","stream_options":null,"stream":true}',
        b'{"stream_options":{"include_usage":false},"stream":true,"model":"m@n"}',
    ],
)
def test_a_body_may_be_renamed_and_asked_at_once(body: bytes) -> None:
    sent = json.loads(b"".join(dialect.rename(body, call(body), "m")))
    assert sent == {"model": "m", "stream": True, "stream_options": {"include_usage": True}}


def test_splices_are_made_in_the_order_of_the_body() -> None:
    pieces = spliced(b"abcdef", [Splice(4, 5, b"E"), Splice(0, 1, b""), Splice(2, 2, b"-")])
    assert b"".join(pieces) == b"b-cdEf"
    assert spliced(b"abc", []) == (b"abc",)


# Any body

_SPELLED = st.sampled_from([
    "stream_options", "Stream_Options", "include_usage", "stream", "model", "messages",
])  # fmt: skip
_KEYS = _SPELLED | st.text(max_size=4)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=8,
)
_GAPS = st.sampled_from(["", " ", "\n\t", "\r\n  "])


@st.composite
def _texts(draw: st.DrawFn, value: Any) -> str:
    """JSON of a value, with blanks and escapes as they like."""

    def gap() -> str:
        return draw(_GAPS)

    def text(plain: str) -> str:
        escaped = "".join(
            f"\\u{ord(one):04x}" if one < "\uffff" and draw(st.integers(0, 9)) == 0 else
            json.dumps(one, ensure_ascii=draw(st.booleans()))[1:-1]
            for one in plain
        )  # fmt: skip
        return f'"{escaped}"'

    def write(one: Any) -> str:
        if isinstance(one, dict):
            inner = ",".join(
                f"{gap()}{text(key)}{gap()}:{gap()}{write(each)}{gap()}"
                for key, each in one.items()
            )
            return "{" + (inner or gap()) + "}"
        if isinstance(one, list):
            return "[" + ",".join(f"{gap()}{write(each)}{gap()}" for each in one) + "]"
        return text(one) if isinstance(one, str) else json.dumps(one)

    return gap() + write(value) + gap()


_OTHERS = st.dictionaries(
    _KEYS.filter(lambda key: key.lower() not in ("stream", "stream_options", "model")), _VALUES
)
_FLAG = st.none() | st.just(False)
_OPTIONS = st.dictionaries(st.text(max_size=4) | st.just("stream_options"), _VALUES, max_size=2)


@st.composite
def _bodies(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    """What a body says, its keys in any order, and how it is spelled."""
    fields: dict[str, Any] = {"stream": True, "model": "m", **draw(_OTHERS)}
    if draw(st.booleans()):
        fields["stream_options"] = draw(st.none() | _OPTIONS)
    if fields.get("stream_options") is not None and draw(st.booleans()):
        fields["stream_options"]["include_usage"] = draw(_FLAG)
    said = {key: fields[key] for key in draw(st.permutations(list(fields)))}
    return said, draw(_texts(said))


@given(_bodies())
def test_an_edited_body_says_the_same_and_asks(made: tuple[dict[str, Any], str]) -> None:
    said, text = made
    body = text.encode("utf-8", "surrogatepass")
    options = {**(said.get("stream_options") or {}), "include_usage": True}
    edit = ask_usage(body)
    assert edit is not None
    assert edit == call(body).usage
    edited = asked(body)
    assert json.loads(edited) == {**said, "stream_options": options}
    # All other bytes are where they were.
    assert edited == body[: edit.start] + edit.text + body[edit.end :]
    assert body[edit.start : edit.end] in (b"", b"null", b"false")


_PAIRS = st.lists(
    st.tuples(
        st.sampled_from(["stream_options", "STREAM_OPTIONS", "stream\\u005foptions", "x"]),
        st.sampled_from(
            ["null", "{}", '{"include_usage":false}', '{"include_usage":true}', "1", '"{}"']
        ),
    ),
    max_size=3,
)


@given(_PAIRS, st.sampled_from(["", " ", "junk", "{}"]))
def test_keys_that_come_twice_are_never_edited(pairs: list[tuple[str, str]], behind: str) -> None:
    inner = "".join(f',"{key}":{value}' for key, value in pairs)
    body = f'{{"stream":true{inner}}}{behind}'.encode()
    named = [value for key, value in pairs if key != "x"]
    editable = named in ([], ["null"], ["{}"], ['{"include_usage":false}'])
    assert (asked(body) != body) is editable
    assert call(body).usage == ask_usage(body)
