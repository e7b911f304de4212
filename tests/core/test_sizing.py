"""How much work a request is, told by its bytes alone."""

import json
from collections.abc import Mapping
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.prefix import blocks
from router.core.sizing import work
from router.core.work import NO_WORK, Priority, Work

_MOST_TOKENS = 262_144
LONG = "word " * 40_000  # 200,000 bytes, without an image
IMAGE = "iVBORw0KGgo" * 20_000


def sized(**fields: object) -> Work:
    return work(json.dumps(fields).encode())


def chat(text: str, **fields: object) -> Work:
    return sized(model="m", messages=[{"role": "user", "content": text}], **fields)


def limits(body: str) -> tuple[int | None, int | None]:
    found = work(body.encode())
    return found.num_ctx, found.max_tokens


@pytest.mark.parametrize(
    ("body", "num_ctx", "most"),
    [
        ("", None, None),
        ("{}", None, None),
        ('{"options":{"num_ctx":8192}}', 8192, None),
        ('{"options": {"num_ctx" : 8192 , "num_predict":\n20}}', 8192, 20),
        ('{"num_predict":20}', None, 20),
        ('{"max_tokens":20}', None, 20),
        ('{"max_completion_tokens":20}', None, 20),
        ('{"max_output_tokens":20}', None, 20),
        ('{"options":{"num_ctx":8192.0}}', 8192, None),
        # what is no limit
        ('{"num_predict":-1,"num_ctx":0}', None, None),
        ('{"num_ctx":null,"max_tokens":null}', None, None),
        ('{"num_ctx":"8192","max_tokens":true}', None, None),
        ('{"num_ctx":1e4}', None, None),
        ('{"num_ctx":99999999999}', None, None),
        ('{"my_num_ctx":8192,"num_ctxs":4096}', None, None),
        # the last one holds, as for whoever reads JSON
        ('{"num_ctx":1,"num_ctx":2,"max_tokens":3,"max_tokens":4}', 2, 4),
        # it has not ended
        ('{"num_ctx":81', None, None),
    ],
)
def test_context_and_length_are_as_the_client_asks(
    body: str, num_ctx: int | None, most: int | None
) -> None:
    assert limits(body) == (num_ctx, most)


@pytest.mark.parametrize(
    "text",
    [
        '"num_ctx": 8192, ',
        '{"options":{"num_ctx":8192}}',
        '\\"num_ctx\\": 8192 ',
        "\\",
        "num_ctx",
        '"max_tokens":7,',
        '","num_ctx":9,"',
    ],
)
@pytest.mark.parametrize("before", [0, 1000, 1020, 30_000])
def test_text_is_not_taken_for_a_limit(text: str, before: int) -> None:
    found = chat("x" * before + text + "x" * before, max_tokens=5)
    assert (found.num_ctx, found.max_tokens) == (None, 5)
    assert sized(**{text + '"num_ctx': 3}).num_ctx is None


@given(st.text(), st.integers(0, 9000))
def test_no_text_is_ever_taken_for_a_limit(text: str, padding: int) -> None:
    for between in ('"num_ctx":', '"num_ctx":5,', '\\"max_tokens":'):
        found = chat(" " * padding + text + between + text)
        assert (found.num_ctx, found.max_tokens) == (None, None)


@pytest.mark.parametrize("padding", range(980, 1030))
def test_a_long_body_is_read_at_both_ends_and_never_across_the_cut(padding: int) -> None:
    """What stands in the middle is not looked for, and half a number is none."""
    entry, middle = '"num_ctx":8192,', "y" * (1024 + 4096)
    before, after = '{"a":"' + "x" * padding + '",', '"a":"' + "x" * (padding + 3072) + '"}'
    in_head = limits(f'{before}{entry}"b":"{middle}"}}') == (8192, None)
    in_tail = limits(f'{{"b":"{middle}",{entry}{after}') == (8192, None)
    assert in_head is (len(before + entry) <= 1024)
    assert in_tail is (len(entry + after) <= 4096)


def test_what_both_ends_only_make_together_is_no_limit() -> None:
    head = '{"a":"' + "x" * 1009 + '"num_ctx"'
    tail = ":5," + "y" * 4093
    assert (len(head), len(tail)) == (1024, 4096)
    assert limits(head + "z" * 9 + tail) == (None, None)


@pytest.mark.parametrize(
    ("size", "num_ctx", "tokens"),
    [
        (4000, None, 1000),
        (4000, 512, 512),
        (4000, 4096, 1000),
        (2_000_000, None, _MOST_TOKENS),
        (2_000_000, 999_999_999, _MOST_TOKENS),
        (3, None, 0),
    ],
)
def test_four_bytes_are_a_token_and_none_is_beyond_the_context(
    size: int, num_ctx: int | None, tokens: int
) -> None:
    ends = b"}" if num_ctx is None else b'"num_ctx":%d}' % num_ctx
    assert work(b" " * (size - len(ends)) + ends).prompt_tokens == tokens


PICTURES: Mapping[str, Mapping[str, object]] = {
    "native": {"content": "what?", "images": [IMAGE]},
    "openai": {"content": [{"image_url": {"url": f"data:image/png;base64,{IMAGE}"}}]},
    "responses": {"content": [{"type": "input_image", "image_url": f"data:image/png,{IMAGE}"}]},
    "sound": {"content": [{"type": "input_audio", "input_audio": {"data": IMAGE}}]},
    "anthropic": {"content": [{"source": {"type": "base64", "data": IMAGE}}]},
}


@pytest.mark.parametrize("form", PICTURES)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_an_image_counts_as_a_constant(form: str, separators: tuple[str, str]) -> None:
    body = json.dumps({"messages": [PICTURES[form]]}, separators=separators)
    assert work(body.encode()).prompt_tokens == 2048


@pytest.mark.parametrize(
    "text",
    ["", ";base64,", '"images": [', '"input_audio"', '"base64"', '"url": "data:image/png'],
)
def test_text_about_images_counts_as_text(text: str) -> None:
    assert chat(LONG + text).prompt_tokens > 50_000


def test_an_image_that_is_small_counts_by_its_bytes() -> None:
    found = sized(messages=[{"content": "", "images": [IMAGE[:4000]]}])
    assert 1000 <= found.prompt_tokens <= 1100


def test_what_does_not_answer_in_text_asks_for_no_token() -> None:
    body = b'{"input":"a","max_tokens":9}'
    assert work(body).max_tokens == 9
    assert work(body, answers=False).max_tokens == 0


def test_what_is_held_while_it_waits_is_all_of_the_body() -> None:
    assert work(b"x" * 100_000).body_bytes == 100_000


def test_who_asks_how_urgently_and_until_when_is_handed_on() -> None:
    text = b"x" * 5000
    found = work(text, "team", Priority.BATCH, 12.5, 2.0)
    assert (found.flow, found.priority, found.deadline) == ("team", Priority.BATCH, 12.5)
    assert (found.blocks, found.weight) == (blocks(text), 2.0)
    assert (work(b"").flow, work(b"").priority, work(b"").deadline) == ("", Priority.NORMAL, inf)
    assert list(NO_WORK.blocks) == []


NAMES = st.sampled_from(
    ["num_ctx", "max_tokens", "num_predict", '"', "\\", ":", " ", "9", "{", "\0"]
)


@given(st.binary() | st.lists(NAMES | st.text(max_size=3)).map(lambda all: "".join(all).encode()))
def test_whatever_the_bytes_are_a_request_has_a_size(body: bytes) -> None:
    for padded in (body, body + b" " * 5000 + body, bytearray(body)):
        found = work(padded)
        assert 0 <= found.prompt_tokens <= min(len(padded) // 4, _MOST_TOKENS)
        assert found.num_ctx is None or found.num_ctx > 0
        assert found.max_tokens is None or found.max_tokens > 0


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    ),
    st.none() | st.integers(1, 999_999_999),
)
def test_of_whatever_json_only_its_limits_are_taken(value: object, num_ctx: int | None) -> None:
    found = sized(messages=value, options={} if num_ctx is None else {"num_ctx": num_ctx})
    assert found.num_ctx == num_ctx


@pytest.mark.parametrize("at_least", [False, True])
@pytest.mark.parametrize("options", [False, True])
def test_a_body_of_openai_asks_for_no_context(*, options: bool, at_least: bool) -> None:
    body = json.dumps({"messages": "x" * 400, "options": {"num_ctx": 64}, "max_tokens": 5}).encode()
    found = work(body, options=options, at_least=at_least)
    assert (found.num_ctx, found.max_tokens) == (64 if options else None, 5)
    assert found.prompt_tokens == (64 if options else len(body) // 4)
    assert found.at_least is (options and at_least)
