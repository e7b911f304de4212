"""The APIs as one table, what routes a body, and how each API says that something failed."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import dialect
from router.core.dialect import (
    ROUTES,
    Asked,
    Call,
    Family,
    Framing,
    Kind,
    Route,
    find,
    is_final,
    parse,
    rename,
)
from router.core.types import Refusal, Rejected
from router.core.wording import dumps, error_body, error_record, error_type, refusal
from tests.core.build import spec

NATIVE, OPENAI, ANTHROPIC = Family.NATIVE, Family.OPENAI, Family.ANTHROPIC
ON, OFF, NEVER = True, False, None
MODEL, MODEL_OR_NAME = ("model",), ("model", "name")

# Routed to one node: whose API, where the model is, the default of `stream`.
ROUTED = {
    "/api/chat": (NATIVE, MODEL, ON),
    "/api/generate": (NATIVE, MODEL, ON),
    "/api/embed": (NATIVE, MODEL, NEVER),
    "/api/embeddings": (NATIVE, MODEL, NEVER),
    "/api/show": (NATIVE, MODEL_OR_NAME, NEVER),
    "/v1/chat/completions": (OPENAI, MODEL, OFF),
    "/v1/completions": (OPENAI, MODEL, OFF),
    "/v1/embeddings": (OPENAI, MODEL, NEVER),
    "/v1/responses": (OPENAI, MODEL, OFF),
    "/v1/messages": (ANTHROPIC, MODEL, OFF),
}

OTHERS = {
    "/": ("GET HEAD", Kind.LOCAL, NATIVE),
    "/api/version": ("GET HEAD", Kind.LOCAL, NATIVE),
    "/api/tags": ("GET HEAD", Kind.LOCAL, NATIVE),
    "/api/ps": ("GET", Kind.LOCAL, NATIVE),
    "/v1/models": ("GET", Kind.LOCAL, OPENAI),
    "/v1/models/:model": ("GET", Kind.LOCAL, OPENAI),
    "/v1/audio/transcriptions": ("POST", Kind.ROUTED, OPENAI),
    "/api/pull": ("POST", Kind.MANAGED, NATIVE),
    "/api/push": ("POST", Kind.ROUTED, NATIVE),
    "/api/create": ("POST", Kind.MANAGED, NATIVE),
    "/api/copy": ("POST", Kind.MANAGED, NATIVE),
    "/api/delete": ("DELETE", Kind.MANAGED, NATIVE),
    "/api/blobs/:digest": ("HEAD POST", Kind.MANAGED, NATIVE),
    "/api/me": ("POST", Kind.ROUTED, NATIVE),
    "/api/signout": ("POST", Kind.ROUTED, NATIVE),
    "/api/user/keys/:key": ("DELETE", Kind.ROUTED, NATIVE),
    "/api/status": ("GET", Kind.ROUTED, NATIVE),
    "/api/experimental/web_search": ("POST", Kind.ROUTED, NATIVE),
    "/api/experimental/web_fetch": ("POST", Kind.ROUTED, NATIVE),
    "/api/experimental/model-recommendations": ("GET", Kind.ROUTED, NATIVE),
}

MISSING = {
    "/api/chat": "model 'NOPE' not found",
    "/api/generate": "model 'NOPE' not found",
    "/api/show": "model 'nope:latest' not found",
    "/api/embed": 'model "NOPE" not found, try pulling it first',
    "/v1/chat/completions": "model 'NOPE' not found",
    "/v1/completions": "model 'NOPE' not found",
    "/v1/embeddings": 'model "NOPE" not found, try pulling it first',
    "/v1/responses": "model 'NOPE' not found",
    "/v1/messages": "model 'NOPE' not found",
}

FINAL = {
    "/api/chat": b'{"model":"m","message":{"role":"assistant","content":""},"done":true}\n',
    "/api/generate": b'{"model":"m","response":"","done":true,"done_reason":"stop"}\n',
    "/v1/chat/completions": b"data: [DONE]\n\n",
    "/v1/completions": b"data: [DONE]\n\n",
    "/v1/responses": b'event: response.completed\ndata: {"type":"response.completed"}\n\n',
    "/v1/messages": b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
}


def route(path: str) -> Route:
    found = find(path)
    assert found is not None
    return found


@pytest.mark.parametrize(("path", "expected"), ROUTED.items(), ids=ROUTED)
def test_routed(path: str, expected: tuple[Family, tuple[str, ...], bool | None]) -> None:
    row = route(path)
    assert (row.family, row.model_in, row.streams) == expected
    assert (row.kind, row.methods) == (Kind.ROUTED, ("POST",))


@pytest.mark.parametrize(("path", "expected"), OTHERS.items(), ids=OTHERS)
def test_routed_without_inference_or_not_routed(
    path: str, expected: tuple[str, Kind, Family]
) -> None:
    row = route(path)
    assert (" ".join(sorted(row.methods)), row.kind, row.family) == expected


def test_the_tables_are_the_whole_api() -> None:
    assert Counter(row.path for row in ROUTES) == Counter([*ROUTED, *OTHERS])


@pytest.mark.parametrize(("path", "text"), MISSING.items(), ids=MISSING)
def test_text_of_404(path: str, text: str) -> None:
    assert route(path).missing.format(name="NOPE", key="nope:latest") == text


def test_every_stream_has_a_last_record_to_be_known_by() -> None:
    assert {row.path for row in ROUTES if row.final} == set(FINAL)
    assert all(row.final in FINAL[row.path] for row in ROUTES if row.final)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/v1/models/llama3:8b", "/v1/models/:model"),
        ("/v1/models/m@gpu-1", "/v1/models/:model"),
        ("/api/blobs/sha256:abc", "/api/blobs/:digest"),
        ("/api/user/keys/k", "/api/user/keys/:key"),
    ],
)
def test_last_segment_may_be_a_value(path: str, label: str) -> None:
    assert route(path).path == label


@pytest.mark.parametrize(
    "path",
    [
        "",
        "//",
        "/api",
        "/api/",
        "/api/chat/",
        "/api//chat",
        "/API/chat",
        "api/chat",
        "/api/blobs",
        "/api/blobs/",
        "/v1/models/",
        "/v1/models/ns/m",
        "/v1/messages/count_tokens",
        "/v1/images/generations",
        "/x",
        "/metrics",
    ],
)
def test_unknown_path(path: str) -> None:
    assert find(path) is None


def call(path: str, body: bytes) -> Call:
    return parse(route(path), body)


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/api/chat", b'{"model":"m"}', "m"),
        ("/api/chat", b'{"MODEL":"a","model":"b"}', "b"),
        ("/api/chat", b'{"model":" m "}', " m "),
        ("/api/chat", b'{"model":"m\\u0040gpu-1"}', "m@gpu-1"),
        ("/api/chat", b'{"model":"m"} trailing', "m"),
        ("/api/chat", b'{"name":"m"}', ""),
        ("/api/chat", b'{"model":""}', ""),
        ("/api/chat", b'{"model":" "}', ""),
        ("/api/chat", b'{"model":null}', ""),
        ("/api/chat", b'{"model":7}', ""),
        ("/api/chat", b'{"model":["m"]}', ""),
        ("/api/chat", b'{"model":"\\x"}', ""),
        ("/api/chat", b'{"messages":[{"model":"m"}]}', ""),
        ("/api/chat", b"{}", ""),
        ("/api/chat", b"", ""),
        ("/api/chat", b"\xff", ""),
        ("/api/chat", b'{"model":"m"', ""),
        ("/api/show", b'{"name":"n"}', "n"),
        ("/api/show", b'{"name":"n","model":"m"}', "m"),
        ("/api/show", b'{"model":"","name":"n"}', "n"),
        ("/api/show", b'{"model":null,"Name":"n"}', "n"),
        ("/api/show", b'{"model":" ","Name":"n"}', "n"),
        ("/api/show", b'{"model":" ","name":"n"}', "n"),
        ("/v1/messages", b'{"max_tokens":1,"model":"m"}', "m"),
    ],
)
def test_model_of_a_body(path: str, body: bytes, model: str) -> None:
    assert call(path, body).model == model


@pytest.mark.parametrize(
    ("body", "native", "foreign"),
    [
        (b'{"stream":true}', True, True),
        (b'{"stream":false}', False, False),
        (b'{"stream":null}', True, False),
        (b"{}", True, False),
        (b'{"stream":"false"}', True, False),
        (b'{"stream":0}', True, False),
        (b'{"Stream":false,"stream":true}', True, True),
        (b'{"stream":true,"STREAM":false}', False, False),
        (b'{"stream":false,"stream":null}', True, False),
        (b'{"options":{"stream":false}}', True, False),
        (b"not json", True, False),
    ],
)
def test_stream_follows_the_default_of_its_api(body: bytes, native: bool, foreign: bool) -> None:
    for path in ("/api/chat", "/api/generate"):
        assert call(path, body).streams is native
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        assert call(path, body).streams is foreign
    for path in ("/api/embed", "/api/embeddings", "/api/show", "/v1/embeddings"):
        assert call(path, body).streams is False


def test_a_bytearray_is_read_as_bytes_are() -> None:
    body = b'{"model":"m@gpu-1","stream":false}'
    found = parse(route("/api/chat"), bytearray(body))
    assert found == call("/api/chat", body)
    assert b"".join(rename(bytearray(body), found, "m")) == b'{"model":"m","stream":false}'


@pytest.mark.parametrize(
    ("body", "sent", "expected"),
    [
        (b'{"model":"m@gpu-1"}', "m", b'{"model":"m"}'),
        (b'{ "model" : "m@gpu-1" , "x":1e400}z', "m", b'{ "model" : "m" , "x":1e400}z'),
        (b'{"model":"a","Model":"b@c"}', "b", b'{"model":"a","Model":"b"}'),
        (b'{"m":"\xff","model":"m\\u0040n"}', "m", b'{"m":"\xff","model":"m"}'),
        (b'{"model":"chat"}', 'q"\\\n', b'{"model":"q\\"\\\\\\n"}'),
        (b'{"model":"m\\u0061"}', "ma", b'{"model":"m\\u0061"}'),
        (b'{"prompt":"m"}', "m", b'{"prompt":"m"}'),
        (b"not json", "m", b"not json"),
    ],
)
def test_rename_replaces_the_models_name_and_nothing_else(
    body: bytes, sent: str, expected: bytes
) -> None:
    assert b"".join(rename(body, call("/api/chat", body), sent)) == expected


_SPELLINGS = st.sampled_from([
    '"model"', '"Model"', '"MODEL"', '"mod\\u0065l"', '"\\u004dodel"', '"name"', '"Name"',
    '"stream"', '"Stream"', '"\u017ftream"', '"\\u017Ftream"',
    '"str\\u0065am"', '"model "', '"x"', '"xmodel"',
])  # fmt: skip
_VALUES = st.sampled_from([
    '"m"', '"n:8b"', '""', '" "', '"\\ud800"', '"a\\u0040b"', "null", "true", "false", "1", "[]",
    '{"model":"inner"}', '{"Model":1}', '["stream"]', '"model"', '"\\"model\\":"', "01", "tru",
])  # fmt: skip
_BODIES = st.lists(st.tuples(_SPELLINGS, st.sampled_from([":", " : "]), _VALUES), max_size=5).map(
    lambda fields: "{" + ",".join("".join(field) for field in fields) + "}"
)


@given(_BODIES, st.sampled_from(["", " ", "x", "{}", "\udcff"]), st.sampled_from(list(FINAL)))
def test_the_quick_reading_says_what_the_exact_one_says_or_nothing(
    text: str, behind: str, path: str
) -> None:
    body = (text + behind).encode("utf-8", "surrogateescape")
    quick = dialect._parse_quickly(route(path), body)
    assert quick in (None, dialect._parse_exactly(route(path), body))


@pytest.mark.parametrize("value", ['"m"', "null"])
def test_the_usual_body_is_read_quickly(value: str) -> None:
    body = b'{"model":%b,"messages":[{"role":"user","content":"hi"}]}' % value.encode()
    assert dialect._parse_quickly(route("/api/chat"), body) is not None


def test_a_large_body_is_read_exactly() -> None:
    body = b'{"images":["%b"],"MODEL":"m"}' % (b"A" * 300_000)
    assert call("/api/chat", body).model == "m"


_KEYS = st.text('mMoOdelname"\\\u212a', max_size=6).filter(lambda key: key.casefold() != "model")


@given(
    st.dictionaries(_KEYS, st.text() | st.none(), max_size=4),
    st.text(min_size=1).filter(lambda text: bool(text.strip())),
    st.text(),
)
def test_a_renamed_body_reads_the_same_but_for_the_model(
    others: dict[str, str | None], model: str, sent: str
) -> None:
    before = {**others, "model": model, "then": others}
    body = json.dumps(before, ensure_ascii=False).encode()
    renamed = b"".join(rename(body, call("/api/chat", body), sent))
    assert json.loads(renamed) == {**before, "model": sent}


OPENAI_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    401: "api_error",
    413: "api_error",
    429: "api_error",
    500: "api_error",
    501: "api_error",
    502: "api_error",
    503: "api_error",
    504: "api_error",
    508: "api_error",
}
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
    413: "api_error",
    500: "api_error",
    501: "api_error",
    502: "api_error",
    504: "api_error",
    508: "api_error",
}
ID = "req_0123456789abcdef01234567"

ONE, TWO = spec("gpu-1", "http://10.0.0.11:11434"), spec("gpu-2", "https://gpu-2.example.com")
REFUSED: dict[str, tuple[str, str, Rejected, int, str]] = {
    "bad name": ("/api/chat", "a b", Rejected(Refusal.BAD_NAME), 400, "invalid model name"),
    "unknown pin lists the nodes": (
        "/api/chat",
        "m",
        Rejected(Refusal.UNKNOWN_PIN, (ONE, TWO)),
        400,
        (
            "no such node; the nodes are: "
            "gpu-1 (http://10.0.0.11:11434), gpu-2 (https://gpu-2.example.com)"
        ),
    ),
    "ambiguous pin names those it fits": (
        "/api/chat",
        "m",
        Rejected(Refusal.AMBIGUOUS_PIN, (ONE, TWO)),
        400,
        "several nodes have that address, pin one by its name: gpu-1, gpu-2",
    ),
    "pinned node down": (
        "/api/chat",
        "m",
        Rejected(Refusal.PIN_DOWN, (ONE,)),
        503,
        "cannot connect to Ollama server at http://10.0.0.11:11434",
    ),
    "not on the pinned node": (
        "/api/embed",
        "x",
        Rejected(Refusal.NOT_ON_PIN, (ONE,)),
        404,
        "model 'x' not found on http://10.0.0.11:11434",
    ),
    "no model: chat": ("/api/chat", "X", Rejected(Refusal.NO_MODEL), 404, "model 'X' not found"),
    "no model: show": (
        "/api/show",
        "x",
        Rejected(Refusal.NO_MODEL),
        404,
        "model 'x:latest' not found",
    ),
    "no model: embed": (
        "/api/embed",
        "x",
        Rejected(Refusal.NO_MODEL),
        404,
        'model "x" not found, try pulling it first',
    ),
    "nodes down are named": (
        "/v1/messages",
        "m",
        Rejected(Refusal.NODES_DOWN, (ONE, TWO)),
        503,
        "no node is up for model 'm': gpu-1, gpu-2",
    ),
    "nodes down for a body without a model": (
        "/api/chat",
        "",
        Rejected(Refusal.NODES_DOWN, (ONE,)),
        503,
        "no node is up for any model: gpu-1",
    ),
    "every node was tried": (
        "/api/chat",
        "m",
        Rejected(Refusal.ALL_TRIED, (ONE, TWO)),
        503,
        "cannot connect to any node that has model 'm': gpu-1, gpu-2",
    ),
    "drained": (
        "/api/chat",
        "m",
        Rejected(Refusal.DRAINED, (ONE,)),
        503,
        "node gpu-1 is being drained, it takes no new requests",
    ),
    "all of them drained": (
        "/api/chat",
        "m",
        Rejected(Refusal.DRAINED, (ONE, TWO)),
        503,
        "nodes gpu-1, gpu-2 are being drained, they take no new requests",
    ),
    "all of them full": (
        "/api/chat",
        "m",
        Rejected(Refusal.BUSY, (ONE, TWO), until=7.0),
        503,
        "all nodes with model 'm' are busy: gpu-1, gpu-2",
    ),
    "tried too often": (
        "/api/chat",
        "m",
        Rejected(Refusal.BUDGET),
        503,
        "too many requests are being tried again, this one is not",
    ),
    "name and path pin different nodes": (
        "/api/chat",
        "m",
        Rejected(Refusal.OUT_OF_SCOPE, (TWO,)),
        400,
        "the path leaves out the node that the model's name pins: gpu-2",
    ),
    "placed nowhere": (
        "/api/pull",
        "m",
        Rejected(Refusal.NOT_PLACED, (ONE, TWO)),
        400,
        "no node may have model 'm': placement or models bar it from gpu-1, gpu-2",
    ),
    "no primary": (
        "/api/me",
        "",
        Rejected(Refusal.UNMARKED, (ONE, TWO)),
        400,
        "no node is marked primary: set it on one of gpu-1, gpu-2",
    ),
    "not for the cloud": (
        "/v1/chat/completions",
        "m:cloud@gpu-1",
        Rejected(Refusal.UNMARKED, (ONE,)),
        400,
        "no node may be asked for the cloud: it is not set on gpu-1",
    ),
    "no room in time": (
        "/api/chat",
        "m",
        Rejected(Refusal.LATE, after_s=9.0),
        503,
        "no node had room for model 'm' in time",
    ),
    "as many wait as may": (
        "/api/chat",
        "m",
        Rejected(Refusal.FULL),
        503,
        "too many requests wait already",
    ),
    "as many of one flow wait as may": (
        "/v1/chat/completions",
        "m",
        Rejected(Refusal.CROWDED),
        429,
        "too many of your requests wait already",
    ),
    "too old": (
        "/v1/messages",
        "m",
        Rejected(Refusal.TOO_OLD, (ONE, TWO), ("0.13.5", "0.12.0")),
        501,
        "/v1/messages needs Ollama 0.14.0: gpu-1 has 0.13.5, gpu-2 has 0.12.0",
    ),
}


@pytest.mark.parametrize(
    ("path", "model", "rejected", "status", "text"), REFUSED.values(), ids=REFUSED
)
def test_refusal(path: str, model: str, rejected: Rejected, status: int, text: str) -> None:
    assert refusal(route(path), model, rejected) == (status, text)


def test_every_refusal_has_its_answer() -> None:
    assert {rejected.refusal for _, _, rejected, _, _ in REFUSED.values()} == set(Refusal)


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_native_error_is_one_string(status: int) -> None:
    assert (
        error_body(NATIVE, status, "model 'x' not found", ID)
        == b"""{"error":"model 'x' not found"}"""
    )


@pytest.mark.parametrize(("status", "kind"), OPENAI_TYPES.items())
def test_openai_error(status: int, kind: str) -> None:
    assert json.loads(error_body(OPENAI, status, "why", ID)) == {
        "error": {"message": "why", "type": kind, "param": None, "code": None}
    }


@pytest.mark.parametrize(("status", "kind"), ANTHROPIC_TYPES.items())
def test_anthropic_error(status: int, kind: str) -> None:
    assert json.loads(error_body(ANTHROPIC, status, "why", ID)) == {
        "type": "error",
        "error": {"type": kind, "message": "why"},
        "request_id": ID,
    }


def test_content_type_of_an_error() -> None:
    assert error_type(NATIVE) == "application/json; charset=utf-8"
    assert error_type(OPENAI) == error_type(ANTHROPIC) == "application/json"


RECORDS = {
    "/api/chat": (Framing.NDJSON, b'{"error":"gone"}\n'),
    "/api/generate": (Framing.NDJSON, b'{"error":"gone"}\n'),
    "/v1/chat/completions": (
        Framing.SSE,
        b'data: {"error":{"message":"gone","type":"api_error","param":null,"code":null}}\n\n',
    ),
    "/v1/completions": (
        Framing.SSE,
        b'data: {"error":{"message":"gone","type":"api_error","param":null,"code":null}}\n\n',
    ),
    "/v1/responses": (
        Framing.SSE,
        (
            b"event: error\n"
            b'data: {"error":{"message":"gone","type":"api_error","param":null,"code":null}}\n\n'
        ),
    ),
    "/v1/messages": (
        Framing.SSE,
        b"event: error\n"
        b'data: {"type":"error","error":{"type":"api_error","message":"gone"},'
        b'"request_id":"' + ID.encode() + b'"}\n\n',
    ),
}


@pytest.mark.parametrize(("path", "expected"), RECORDS.items(), ids=RECORDS)
def test_error_record_ends_a_stream_in_its_own_framing(
    path: str, expected: tuple[Framing, bytes]
) -> None:
    framing, record = expected
    assert error_record(route(path), framing, 502, "gone", ID) == record


@given(st.text())
def test_an_error_record_is_one_line_whoever_splits_it(message: str) -> None:
    """The Python client cuts NDJSON at U+2028, U+0085 and their like too."""
    record = error_record(route("/api/chat"), Framing.NDJSON, 502, message, ID)
    assert json.loads(record) == {"error": message}
    assert len(record.decode().splitlines()) == 1


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029"])
def test_no_mark_that_a_client_takes_for_a_line_end_is_written_raw(mark: str) -> None:
    assert len(dumps({"error": f"a{mark}b"}).decode().splitlines()) == 1


def test_json_is_spaced_as_go_spaces_it() -> None:
    assert dumps({"a": [1, None, True], "b": "é"}) == '{"a":[1,null,true],"b":"é"}'.encode()


def test_a_lone_surrogate_can_be_told() -> None:
    assert json.loads(dumps({"error": "a\ud800b"}))


@pytest.mark.parametrize(
    ("path", "records", "final"),
    [
        ("/api/chat", b'{"done":false}\n{"message":{},"done":true}\n', True),
        ("/api/chat", b'{"done":true}', True),
        ("/api/chat", b'{"message":{"tool_calls":[{"done":true}]},"done":false}\n', False),
        ("/api/chat", b'{"error":"boom"}\n', False),
        ("/api/chat", b"garbage\n", False),
        ("/v1/chat/completions", b"data: {}\n\ndata: [DONE]\n\n", True),
        ("/v1/chat/completions", b'data: {"delta":"data: [DONE]"}\n\n', False),
        ("/v1/messages", b"event: message_stop\ndata: {}\n\n", True),
        ("/v1/messages", b'event: ping\ndata: {"text":"event: message_stop"}\n\n', False),
        ("/v1/responses", b"event: response.completed\ndata: {}\n\n", True),
        ("/api/embed", b'{"done":true}', False),
    ],
)
def test_the_last_record_of_a_complete_answer_is_read_and_not_guessed(
    path: str, records: bytes, final: bool
) -> None:
    assert is_final(route(path), records) is final


@pytest.mark.parametrize(
    ("path", "query", "target"),
    [
        ("/api/chat", "?a=%20", "/api/chat?a=%20"),
        ("/api/user/keys/ab+c d", "", "/api/user/keys/ab%2Bc%20d"),
    ],
)
def test_a_node_is_asked_for_the_path_that_was_asked_for(
    path: str, query: str, target: str
) -> None:
    assert Asked(route(path), path, query).target == target
