"""An answer that another node finishes: what this one is asked, and how its records follow on."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core import dialect
from router.core.continuation import Plan, Unable, may, plan
from router.core.dialect import Call, Route
from router.core.stitch import Stitch
from router.sim import SimModel, gojson
from router.sim.answer import Ask, Metrics, PieceKind, compose
from router.sim.native import now
from router.sim.prompt import Message, Prompt, of_messages, of_raw
from router.sim.request import Fields

NATIVE, OPENAI, RAW = "/api/chat", "/v1/chat/completions", "/api/generate"
DONE = b"data: [DONE]\n\n"
USER = '{"role":"user","content":"Why?"}'
USAGE = {"stream_options": {"include_usage": True}}


def route(path: str) -> Route:
    found = dialect.find(path)
    assert found is not None
    return found


def line(content: str = "", *, thinking: str = "", **fields: Any) -> bytes:
    """A record of /api/chat."""
    message = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    record = {"model": "m", "created_at": "2026-11-22T20:00:00Z", "message": message}
    return gojson.line({**record, "done": False, **fields})


def event(delta: Mapping[str, Any] | None, finish: str | None = None, **fields: Any) -> bytes:
    """A chunk of OpenAI's; without a delta, one that has no choice."""
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    head = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 11,
        "model": "m",
        "system_fingerprint": "fp_ollama",
    }
    return gojson.event({**head, "choices": [] if delta is None else choices, **fields})


def second(data: bytes) -> bytes:
    """The same as another node says it."""
    other = data.replace(b'"chatcmpl-1"', b'"chatcmpl-222"').replace(
        b'"created":11', b'"created":9'
    )
    return other.replace(b"fp_ollama", b"fp_other")


def told(prompt: int, completion: int) -> dict[str, int]:
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


LINES = line("It") + line(" is")
EVENTS = event({"role": "assistant", "content": "It"}) + event({"content": " is"})
OLD_EVENTS = event({"role": "assistant", "content": "It"}) + event(
    {"role": "assistant", "content": " is"}
)
RESPONSES = b"".join(
    gojson.line({"model": "m", "created_at": "x", "response": text, "done": False})
    for text in ("It", " is")
)
SEEN = {NATIVE: LINES, OPENAI: EVENTS, RAW: RESPONSES}


def filled(text: str) -> str:
    """With a message of a user's in each place that is marked for it."""
    return text.replace("@", USER)


def asked(path: str, body: str | bytes, relayed: bytes | None = None, **options: bool) -> bytes:
    """What another node is sent to go on with an answer to `body`."""
    made = made_plan(path, body, relayed, **options)
    assert made.ending == b""
    return b"".join(made.body)


def made_plan(path: str, body: str | bytes, relayed: bytes | None = None, **options: bool) -> Plan:
    sent = filled(body).encode() if isinstance(body, str) else body
    return plan(route(path), (sent,), SEEN[path] if relayed is None else relayed, **options)


# Whether it is worth a thought


@pytest.mark.parametrize(
    ("path", "body", "streams", "worth"),
    [
        (NATIVE, b"{}", True, True),
        (NATIVE, b"{}", False, False),
        (OPENAI, b"{}", True, True),
        (OPENAI, b"{}", False, False),
        (RAW, b'{"prompt":"x"}', True, False),
        (RAW, b'{"prompt":"x","raw":true}', True, True),
        (RAW, b'{"raw":true,"images":["' + b"x" * 1_000_000 + b'"]}', True, True),
        (RAW, b'{"images":["' + b"x" * 1_000_000 + b'"],"raw":true}', True, True),
        (RAW, b'{"images":["' + b"x" * 1_000_000 + b'"]}', True, False),
        ("/v1/completions", b"{}", True, False),
        ("/v1/messages", b"{}", True, False),
        ("/api/pull", b"{}", True, False),
    ],
)
def test_only_streams_that_may_be_gone_on_with_are_kept(
    path: str, body: bytes, *, streams: bool, worth: bool
) -> None:
    call = Call(route(path), "m", streams)
    assert may(call, body) is worth
    assert may(call, bytearray(body)) is worth


# What another node is asked

SPLICED: dict[str, tuple[str, str, bytes | None, str]] = {
    "a message more": (
        NATIVE,
        '{"model":"m","messages":[@]}',
        None,
        '{"model":"m","messages":[@,{"role":"assistant","content":"It is"}]}',
    ),
    "blanks, and what follows the object": (
        NATIVE,
        ' { "messages" : [ @ \n] , "model" : "m" } junk',
        None,
        ' { "messages" : [ @,{"role":"assistant","content":"It is"} \n] , "model" : "m" } junk',
    ),
    "keys as Go reads them": (
        NATIVE,
        '{"messages":[{}],"MESSAGES":[@],"Options":{"Num_Predict":9}}',
        None,
        (
            '{"messages":[{}],"MESSAGES":[@,{"role":"assistant","content":"It is"}],'
            '"Options":{"Num_Predict":7}}'
        ),
    ),
    "text that JSON escapes": (
        NATIVE,
        '{"messages":[@]}',
        line('"\\\n') + line("<b>\u2028 \u6f22\U0001f999"),
        '{"messages":[@,{"role":"assistant","content":"\\"\\\\\\n<b>\\u2028 \u6f22\U0001f999"}]}',
    ),
    "thinking, once content has begun": (
        NATIVE,
        '{"messages":[@],"options":{"num_predict":9}}',
        line(thinking="Hm") + line(thinking=".") + LINES,
        (
            '{"messages":[@,{"role":"assistant","content":"It is","thinking":"Hm."}],'
            '"options":{"num_predict":5}}'
        ),
    ),
    "thinking and content in one record": (
        NATIVE,
        '{"messages":[@],"options":{"num_predict":9}}',
        line("It", thinking="Hm") + line(" is"),
        (
            '{"messages":[@,{"role":"assistant","content":"It is","thinking":"Hm"}],'
            '"options":{"num_predict":7}}'
        ),
    ),
    "reasoning": (
        OPENAI,
        '{"messages":[@]}',
        event({"role": "assistant", "content": "", "reasoning": "Hm"}) + EVENTS,
        '{"messages":[@,{"role":"assistant","content":"It is","reasoning":"Hm"}]}',
    ),
    "a beginning by the client": (
        NATIVE,
        '{"messages":[@,{"role":"assistant","content":"Well\\u002c "} ]}',
        None,
        '{"messages":[@,{"role":"assistant","content":"Well\\u002c It is"} ]}',
    ),
    "a beginning with more fields": (
        OPENAI,
        '{"messages":[{"Content":"a","content":"b","ROLE":"Assistant","tool_calls":[]}]}',
        None,
        '{"messages":[{"Content":"a","content":"bIt is","ROLE":"Assistant","tool_calls":[]}]}',
    ),
    "a turn before, and parts of a content": (
        OPENAI,
        '{"messages":[{"role":"assistant","content":"No"},{"role":"user","content":[]}]}',
        None,
        (
            '{"messages":[{"role":"assistant","content":"No"},{"role":"user","content":[]},'
            '{"role":"assistant","content":"It is"}]}'
        ),
    ),
    "a message without a role": (
        NATIVE,
        '{"messages":[{"content":"x"}]}',
        None,
        '{"messages":[{"content":"x"},{"role":"assistant","content":"It is"}]}',
    ),
    "halves of pairs, which Go takes": (
        NATIVE,
        '{"messages":[{"role":"user","content":"\\ud83e \\\\ud83e \u6f22"}]}',
        None,
        (
            '{"messages":[{"role":"user","content":"\\ud83e \\\\ud83e \u6f22"},'
            '{"role":"assistant","content":"It is"}]}'
        ),
    ),
    "a raw prompt": (
        RAW,
        '{"prompt":"[INST] x [/INST]","raw":true,"options":{"num_predict":3}}',
        None,
        '{"prompt":"[INST] x [/INST]It is","raw":true,"options":{"num_predict":1}}',
    ),
    "max_tokens": (
        OPENAI,
        '{"max_tokens": 12 ,"messages":[@]}',
        None,
        '{"max_tokens": 10 ,"messages":[@,{"role":"assistant","content":"It is"}]}',
    ),
    "max_completion_tokens": (
        OPENAI,
        '{"max_tokens":null,"max_completion_tokens":12,"messages":[@]}',
        None,
        (
            '{"max_tokens":null,"max_completion_tokens":10,"messages":[@,'
            '{"role":"assistant","content":"It is"}]}'
        ),
    ),
    "no limit": (
        NATIVE,
        '{"messages":[@],"options":{"num_predict":-1}}',
        None,
        '{"messages":[@,{"role":"assistant","content":"It is"}],"options":{"num_predict":-1}}',
    ),
    "options of another kind": (
        NATIVE,
        '{"options":{"seed":1},"messages":[@]}',
        None,
        '{"options":{"seed":1},"messages":[@,{"role":"assistant","content":"It is"}]}',
    ),
    "no limit of OpenAI's": (
        OPENAI,
        '{"max_tokens":0,"messages":[@]}',
        None,
        '{"max_tokens":0,"messages":[@,{"role":"assistant","content":"It is"}]}',
    ),
    "no format": (
        NATIVE,
        '{"format":"","messages":[@],"options":null}',
        None,
        '{"format":"","messages":[@,{"role":"assistant","content":"It is"}],"options":null}',
    ),
    "format null": (
        NATIVE,
        '{"messages":[@],"format":"json","format":null}',
        None,
        '{"messages":[@,{"role":"assistant","content":"It is"}],"format":"json","format":null}',
    ),
    "plain text is no structure": (
        OPENAI,
        '{"response_format":{"type":"text"},"messages":[@]}',
        None,
        (
            '{"response_format":{"type":"text"},"messages":[@,'
            '{"role":"assistant","content":"It is"}]}'
        ),
    ),
    "comments and blank lines": (
        OPENAI,
        '{"messages":[@]}',
        b": hello\n\n\r\n" + EVENTS.replace(b"\n", b"\r\n"),
        '{"messages":[@,{"role":"assistant","content":"It is"}]}',
    ),
    "parts that say nothing": (
        OPENAI,
        '{"messages":[@]}',
        EVENTS + event({"content": None, "refusal": None, "tool_calls": []}),
        '{"messages":[@,{"role":"assistant","content":"It is"}]}',
    ),
    "nothing but who speaks": (
        OPENAI,
        '{"messages":[],"max_tokens":5,"response_format":{"type":"json_object"}}',
        event({"role": "assistant", "content": ""}),
        '{"messages":[],"max_tokens":5,"response_format":{"type":"json_object"}}',
    ),
    "nothing at all": (
        NATIVE,
        '{"options":{"num_predict":1}}',
        b"",
        '{"options":{"num_predict":1}}',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLICED)
def test_what_was_said_is_put_at_the_end_and_nothing_else_moves(case: str) -> None:
    path, body, relayed, sent = SPLICED[case]
    assert asked(path, body, relayed).decode() == filled(sent)


def test_a_body_in_pieces_is_one_and_whole_ones_are_not_copied() -> None:
    body = filled('{"messages":[@]}').encode()
    longer = filled('{"messages":[@,{"role":"assistant","content":"It is"}]}').encode()
    view = memoryview(body)
    for pieces in ((body,), (bytearray(body),), (view,), (view[:9], b"", view[9:])):
        assert b"".join(plan(route(NATIVE), pieces, LINES).body) == longer
        assert b"".join(plan(route(NATIVE), pieces, bytearray(LINES)).body) == longer
    (same,) = plan(route(NATIVE), (body,), b"").body
    assert same is body


def test_invalid_text_elsewhere_does_not_matter() -> None:
    body = b'{"messages":[{"role":"user","content":"\xff\xe2\x80"}]}'
    assert asked(NATIVE, body) == body[:-2] + b',{"role":"assistant","content":"It is"}]}'


CALLED = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
BEGUN = '{"messages":[{"role":"assistant","content":%s}]}'
PLAIN = '{"messages":[@]}'
REFUSED: dict[str, tuple[str, str | bytes, bytes | None, str]] = {
    "another endpoint": ("/v1/completions", "{}", b"", "another endpoint"),
    "tool calls": (NATIVE, PLAIN, LINES + line(message=CALLED), "tool calls"),
    "tool calls of OpenAI": (OPENAI, PLAIN, event({"tool_calls": [{"index": 0}]}), "tool calls"),
    "images out": (NATIVE, PLAIN, line(message={"content": "", "images": ["x"]}), "images"),
    "an image out": (
        RAW, '{"prompt":"x","raw":true}', gojson.line({"image": "x", "done": False}), "images",
    ),
    "audio out": (OPENAI, PLAIN, event({"audio": {"data": "x"}}), "audio"),
    "a part of another kind": (OPENAI, PLAIN, event({"smell": "x"}), "an unknown part"),
    "a grammar": (NATIVE, '{"format":"json","messages":[@]}', None, "structured output"),
    "a schema": (NATIVE, '{"Format":{},"messages":[@]}', None, "structured output"),
    "json_object": (
        OPENAI, '{"response_format":{"type":"json_object"},"messages":[@]}', None,
        "structured output",
    ),
    "a prompt for a template": (RAW, '{"prompt":"x"}', None, "no raw prompt"),
    "raw in name only": (RAW, '{"prompt":"x","raw":false}', None, "no raw prompt"),
    "thinking in a raw prompt": (
        RAW, '{"prompt":"x","raw":true}',
        gojson.line({"response": "", "thinking": "Hm", "done": False}) + RESPONSES, "thinking",
    ),
    "thinking alone": (NATIVE, PLAIN, line(thinking="Hm"), "thinking"),
    "thinking after content": (NATIVE, PLAIN, LINES + line(thinking="Hm"), "thinking"),
    "thinking after a beginning": (NATIVE, BEGUN % '"x"', line(thinking="H") + LINES, "thinking"),
    "a beginning in parts": (OPENAI, BEGUN % "[]", None, "no text in content"),
    "a beginning without content": (OPENAI, BEGUN % "null", None, "no text in content"),
    "a beginning that called tools": (
        NATIVE, '{"messages":[{"role":"assistant","content":"x","tool_calls":[{}]}]}', None,
        "tool calls",
    ),
    "no prompt": (RAW, '{"raw":true}', None, "no text in prompt"),
    "no messages": (NATIVE, '{"messages":[]}', None, "no messages"),
    "messages of another kind": (NATIVE, '{"messages":"x"}', None, "no messages"),
    "a message of another kind": (NATIVE, '{"messages":[1]}', None, "unreadable request"),
    "a role of another kind": (NATIVE, '{"messages":[{"role":1}]}', None, "unreadable request"),
    "a limit of another kind": (
        OPENAI, '{"max_tokens":1.5,"messages":[]}', None, "unreadable request",
    ),
    "no object": (NATIVE, "[]", None, "unreadable request"),
    "no JSON": (NATIVE, b"\xff", None, "unreadable request"),
    "a complete answer": (NATIVE, PLAIN, LINES + line(done=True), "complete"),
    "a complete answer of OpenAI's": (OPENAI, PLAIN, EVENTS + DONE, "complete"),
    "a complete answer but for the counts": (
        OPENAI, json.dumps({"messages": [], **USAGE}), EVENTS + event({}, "stop"),
        "no token counts",
    ),
    "an error": (NATIVE, PLAIN, LINES + b'{"error":"x"}\n', "an error relayed"),
    "an error of OpenAI's": (OPENAI, PLAIN, b'data: {"error":{}}\n\n', "an error relayed"),
    "several choices": (
        OPENAI, PLAIN, EVENTS.replace(b'"index":0', b'"index":1'), "several choices",
    ),
    "half a record": (NATIVE, PLAIN, LINES[:-5], "unreadable records"),
    "a record of another kind": (NATIVE, PLAIN, b"[]\n", "unreadable records"),
    "content of another kind": (NATIVE, PLAIN, line(message={"content": 1}), "unreadable records"),
    "a named event": (OPENAI, PLAIN, b"event: x\ndata: {}\n\n", "unreadable records"),
    "half an event": (OPENAI, PLAIN, EVENTS[:-9], "unreadable records"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_other_node_can_be_told_is_refused_with_its_reason(case: str) -> None:
    path, body, relayed, why = REFUSED[case]
    with pytest.raises(Unable) as refused:
        made_plan(path, body, relayed)
    assert str(refused.value) == why


# Endings


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("path", [NATIVE, RAW])
def test_an_answer_that_has_all_its_tokens_ends_with_length(path: str, limit: int) -> None:
    body = {"messages": [], "prompt": "x", "raw": True, "options": {"num_predict": limit}}
    ending = made_plan(path, json.dumps(body)).ending
    assert dialect.is_final(route(path), ending)
    final = json.loads(ending)
    last = json.loads(SEEN[path].splitlines()[-1])
    said = {"message": {"role": "assistant", "content": ""}} if path == NATIVE else {"response": ""}
    assert final == {**last, **said, "done": True, "done_reason": "length", "eval_count": 2}


@pytest.mark.parametrize("withholds", [False, True])
@pytest.mark.parametrize("options", [{}, USAGE, {"stream_options": {"include_usage": False}}])
def test_so_does_one_of_openais(options: Mapping[str, Any], *, withholds: bool) -> None:
    body = json.dumps({"max_tokens": 2, "messages": [], **options})
    ending = made_plan(OPENAI, body, withholds=withholds).ending
    events = ending.split(b"\n\n")
    wanted = [{"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}]
    if options == USAGE and not withholds:
        wanted.append({"choices": [], "usage": told(0, 2)})  # type: ignore[dict-item]
    first = json.loads(EVENTS.split(b"\n\n")[0].removeprefix(b"data: "))
    assert [json.loads(one.removeprefix(b"data: ")) for one in events[:-2]] == [
        {**first, **one} for one in wanted
    ]
    assert events[-2:] == [b"data: [DONE]", b""]


def test_thoughts_that_have_all_tokens_end_too() -> None:
    body = '{"messages":[@],"options":{"num_predict":1}}'
    assert b'"done_reason":"length"' in made_plan(NATIVE, body, line(thinking="Hm")).ending


@pytest.mark.parametrize(
    ("options", "counted", "withholds"),
    [({}, False, False), (USAGE, True, False), (USAGE, False, True)],
)
@pytest.mark.parametrize("delta", [{}, {"tool_calls": [{"index": 0}]}])
def test_an_answer_that_lacks_only_its_end_gets_it(
    options: Mapping[str, Any], delta: Mapping[str, Any], *, counted: bool, withholds: bool
) -> None:
    relayed = EVENTS + event(delta, "stop")
    relayed += event(None, usage=told(7, 2)) if counted else b""
    body = json.dumps({"messages": [], "response_format": {"type": "json_object"}, **options})
    made = made_plan(OPENAI, body, relayed, withholds=withholds)
    assert (made.ending, made.body) == (DONE, ())


# What another node says


def stitch(path: str, relayed: bytes | None = None) -> Stitch:
    return made_plan(path, PLAIN if path != RAW else '{"raw":true,"prompt":""}', relayed).stitch


OTHER = b": comment\n\nevent: x\ndata: {}\n\n"
SAYS = event({"role": "assistant", "content": " not"})
STITCHED: dict[str, tuple[bytes, bytes]] = {
    "the role again in each, and a finish with an empty delta (0.24)": (
        SAYS + event({"role": "assistant", "content": ""}, "stop") + DONE,
        event({"content": " not"}) + event({"content": ""}, "stop") + DONE,
    ),
    "the role in the first, and a finish of its own": (
        SAYS + event({"content": " so"}) + event({}, "stop") + DONE,
        event({"content": " not"}) + event({"content": " so"}) + event({}, "stop") + DONE,
    ),
    "the role alone": (
        event({"role": "assistant"}) + event({"role": "assistant", "content": ""}) + DONE, DONE,
    ),
    "the role alone at the end": (
        event({"role": "assistant"}, "stop") + DONE, event({}, "stop") + DONE,
    ),
    "the role behind the content": (
        event({"content": "x", "role": "assistant"}), event({"content": "x"}),
    ),
    "the role between": (
        event({"content": "", "role": "assistant", "reasoning": "x"}),
        event({"content": "", "reasoning": "x"}),
    ),
    "tool calls": (
        event({"role": "assistant", "tool_calls": [{"index": 0, "id": "call_1"}]}),
        event({"tool_calls": [{"index": 0, "id": "call_1"}]}),
    ),
    "token counts": (
        event(None, usage=told(27, 8)) + DONE, event(None, usage=told(25, 10)) + DONE,
    ),
    "a prompt shorter than what was relayed": (
        event(None, usage=told(1, 8)), event(None, usage=told(0, 10)),
    ),
    "counts of another kind": (
        event(None, usage={"prompt_tokens": 9, "details": {"prompt_tokens": 9}}),
        event(None, usage={"prompt_tokens": 7, "details": {"prompt_tokens": 9}}),
    ),
    "no counts": (event({"content": "x"}, usage=None), event({"content": "x"}, usage=None)),
    "a choice without a delta": (
        gojson.event({"id": "chatcmpl-1", "choices": [{"text": "x"}]}),
        gojson.event({"id": "chatcmpl-1", "choices": [{"text": "x"}]}),
    ),
    "text that looks like them": (
        event({"content": '"id":"chatcmpl-9","role":"assistant"'}),
        event({"content": '"id":"chatcmpl-9","role":"assistant"'}),
    ),
    "other line ends": (
        SAYS.replace(b"\n", b"\r\n") + DONE,
        event({"content": " not"}).replace(b"\n", b"\r\n") + DONE,
    ),
    "blanks": (
        SAYS.replace(b":{", b" : { ").replace(b'"assistant",', b'"assistant" , '),
        event({"content": " not"}).replace(b":{", b" : { "),
    ),
    "what is no chunk": (OTHER, OTHER),
    "nothing": (b"", b""),
}  # fmt: skip


@pytest.mark.parametrize("case", STITCHED)
@pytest.mark.parametrize("seen", [EVENTS, OLD_EVENTS], ids=["HEAD", "0.24"])
def test_chunks_go_on_as_the_first_stream_began(case: str, seen: bytes) -> None:
    said, shown = STITCHED[case]
    made = stitch(OPENAI, seen)
    assert made.feed(second(said)).decode() == shown.decode()
    one_by_one = b"".join(map(made.feed, second(said).replace(b"\n\n", b"\n\n\0").split(b"\0")))
    assert one_by_one == shown


@pytest.mark.parametrize("old", [False, True])
def test_chunks_that_begin_alike_are_stitched_alike(*, old: bool) -> None:
    role = {"role": "assistant"} if old else {}
    said = [event({**role, "content": text}) for text in ("a", "b", '"role"', "", '"usage"', "c")]
    said += [one.replace(b'"created":11', b'"created":12') for one in said]
    said += [event({**role, "content": ""}, "stop"), event(None, usage=told(9, 6)), DONE]
    shown = [event({"content": text}) for text in ("a", "b", '"role"', "", '"usage"', "c")] * 2
    shown += [event({"content": ""}, "stop"), event(None, usage=told(7, 8)), DONE]
    made = stitch(OPENAI)
    fed = [made.feed(second(one).replace(b'"created":9', b'"created":8')) for one in said]
    if old:
        shown[3] = shown[9] = b""
    assert fed == shown


def test_a_head_behind_the_choices_is_the_first_streams_too() -> None:
    made = stitch(OPENAI)
    for text in ("a", "b"):
        said = gojson.event({"created": 9, "choices": [{"delta": {"content": text}}], "id": "x"})
        want = said.replace(b'"x"', b'"chatcmpl-1"').replace(b":9", b":11")
        assert made.feed(said) == want


@pytest.mark.parametrize(
    "said",
    [
        b"data: {", b'data: {"id":"x","choices":[{"delta":3}]}\n\n', b"data: []\n\n",
        b'data: {"id":"x","choices":[{"delta":{"role":"assistant"}]\n\n',
        b'data: {"id":"x","usage":{"prompt_tokens":1.5}}\n\n', b"half\n\n", b"\n\n\n",
    ],
)  # fmt: skip
def test_what_cannot_be_read_passes_as_it_is(said: bytes) -> None:
    assert stitch(OPENAI).feed(said) == said


def test_a_stream_that_was_not_begun_is_not_held_to_anything() -> None:
    made = made_plan(OPENAI, PLAIN, b": comment\n\n").stitch
    said = SAYS + event(None, usage=told(7, 2)) + DONE
    assert made.feed(said) == said


def test_who_speaks_is_told_once_even_if_nothing_was_said() -> None:
    made = made_plan(OPENAI, PLAIN, event({"role": "assistant", "content": ""})).stitch
    said = second(SAYS + event(None, usage=told(7, 2)))
    assert made.feed(said) == event({"content": " not"}) + event(None, usage=told(7, 2))


FINAL: dict[str, Any] = {"done": True, "done_reason": "stop", "total_duration": 5}
COUNTED: dict[str, tuple[bytes, bytes]] = {
    "counts": (
        line(**FINAL, prompt_eval_count=27, eval_count=8),
        line(**FINAL, prompt_eval_count=25, eval_count=10),
    ),
    "none, as all of it was said before": (
        line(**FINAL, prompt_eval_count=1), line(**FINAL, prompt_eval_count=0, eval_count=2),
    ),
    "behind text": (
        line(" not") + line(**FINAL, eval_count=8), line(" not") + line(**FINAL, eval_count=10),
    ),
    "text alone": (line(" not"), line(" not")),
    "a call that looks final": (
        line(message={"tool_calls": [{"done": True}]}),
        line(message={"tool_calls": [{"done": True}]}),
    ),
    "blanks": (b'{"done": true, "eval_count": 1 }\n', b'{"done": true, "eval_count": 3 }\n'),
    "no line end": (b'{"done":true,"eval_count":1}', b'{"done":true,"eval_count":3}'),
    "half a record": (b'{"x":{"done":true', b'{"x":{"done":true'),
    "counts of another kind": (
        b'{"done":true,"eval_count":1.5}\n', b'{"done":true,"eval_count":1.5}\n',
    ),
    "nothing": (b"", b""),
}  # fmt: skip


@pytest.mark.parametrize("case", COUNTED)
@pytest.mark.parametrize("path", [NATIVE, RAW])
def test_final_counts_are_those_of_the_whole(path: str, case: str) -> None:
    said, shown = COUNTED[case]
    assert stitch(path).feed(said).decode() == shown.decode()


# The simulated node: its text is a function of the prompt alone

MODEL = SimModel("llama3:8b")
BOUNDS = (4, 30)


def prompt_of(path: str, fields: Fields) -> Prompt:
    if path == RAW:
        return of_raw(fields.text("prompt"))
    thinking = "thinking" if path == NATIVE else "reasoning"
    return of_messages(
        [
            Message(one.text("role"), one.text("content"), one.text(thinking))
            for one in fields.objects("messages")
        ]
    )


def answer(path: str, body: bytes, number: int) -> list[bytes]:
    """The records of a simulated node; `number` tells its stream from others."""
    fields = Fields(gojson.decode_object(body))
    options = fields.part("options") if path != OPENAI else fields
    cap = options.number("num_predict" if path != OPENAI else "max_tokens")
    prompt = prompt_of(path, fields)
    think = fields.flag("think", default=False)
    made = compose(Ask("m", MODEL, prompt, stream=True, cap=cap, think=think), BOUNDS)
    counts = Metrics(0, 0, prompt.tokens, 0, made.tokens, 0)
    texts = [(piece.text, piece.kind is PieceKind.THINKING) for piece in made.pieces]
    if path == OPENAI:
        return chunks(texts, made.done_reason, counts, number)
    final: dict[str, Any] = {"done": True, "done_reason": made.done_reason, **counts.native()}
    if path == RAW:
        head = {"model": "m", "created_at": now()}
        says = [gojson.line({**head, "response": text, "done": False}) for text, _ in texts]
        return [*says, gojson.line({**head, "response": "", **final})]
    says = [line("", thinking=text) if thought else line(text) for text, thought in texts]
    return [*says, line(**final)]


def chunks(
    texts: Sequence[tuple[str, bool]], finish: str, counts: Metrics, number: int
) -> list[bytes]:
    old = number % 2 == 1  # every other node repeats the role
    made = []
    for at, (text, thought) in enumerate(texts):
        said = {"content": "", "reasoning": text} if thought else {"content": text}
        made.append(event({"role": "assistant", **said} if old or not at else said))
    made.append(event({"role": "assistant", "content": ""} if old else {}, finish))
    made.append(event(None, usage=told(counts.prompt_tokens, counts.answer_tokens)))
    own = b'"id":"chatcmpl-%d"' % number
    return [one.replace(b'"id":"chatcmpl-1"', own) for one in (*made, DONE)]


def spoken(path: str, records: bytes) -> tuple[str, str, str | None, int | None]:
    """Text, thinking, why it ended and how many tokens it took, as a client reads them."""
    text = thinking = ""
    reason, tokens = None, None
    for one in records.split(b"\n"):
        if not one or one == DONE.strip():
            continue
        record = json.loads(one.removeprefix(b"data: "))
        if path != OPENAI:
            said = record.get("message", record)
            reason, tokens = record.get("done_reason"), record.get("eval_count")
        else:
            for choice in record["choices"]:
                reason = choice["finish_reason"]
            said = record["choices"][0]["delta"] if record["choices"] else {}
            tokens = record.get("usage", {}).get("completion_tokens")
        text += said.get("content", "") + (said.get("response", "") if path == RAW else "")
        thinking += said.get("thinking", "") + said.get("reasoning", "")
    return text, thinking, reason, tokens


def went_on(path: str, body: bytes, cuts: Sequence[float]) -> bytes:
    """What a client sees of an answer whose nodes die, one after the other, behind a record."""
    seen, sent, made = b"", body, None
    for number, cut in enumerate((*cuts, None)):
        records = answer(path, sent, number)
        if cut is not None:
            records = records[: int(cut * len(records))]
        for record in records:
            seen += record if made is None else made.feed(record)
        if cut is None:
            break
        try:
            after = plan(route(path), (body,), seen)
        except Unable as why:
            assert str(why) in ("complete", "thinking", "no token counts")  # noqa: PT017
            return b""
        if after.ending:
            return seen + after.ending
        sent, made = b"".join(after.body), after.stitch
    return seen


@pytest.mark.parametrize("path", [NATIVE, OPENAI, RAW])
def test_a_cut_behind_each_record_goes_on_to_the_same_end(path: str) -> None:
    messages = [{"role": "user", "content": "Why?"}]
    body = json.dumps({"messages": messages, "prompt": "Why?\n", "raw": True, **USAGE}).encode()
    whole = answer(path, body, 0)
    ends = 3 if path == OPENAI else 1  # what follows the text: a finish, counts, [DONE]
    for at in range(len(whole) - ends + 1):
        seen = went_on(path, body, [(at + 0.5) / len(whole)])
        assert spoken(path, seen) == spoken(path, b"".join(whole))


@given(
    path=st.sampled_from([NATIVE, OPENAI, RAW]),
    text=st.text(max_size=40),
    begun=st.none() | st.integers(0, 30),
    think=st.booleans(),
    cap=st.none() | st.integers(1, 40),
    cuts=st.lists(st.floats(0, 1), min_size=1, max_size=2),
)
def test_any_cut_goes_on_to_the_uninterrupted_text(
    path: str, text: str, begun: int | None, cuts: list[float], cap: int | None, *, think: bool
) -> None:
    messages: list[dict[str, str]] = [{"role": "user", "content": text}]
    raw = f"[INST]{text}[/INST]"
    asks = {"messages": messages, "prompt": raw, "raw": True, "think": think and path != RAW}
    if begun is not None:
        full = spoken(path, b"".join(answer(path, json.dumps(asks).encode(), 0)))[0]
        messages.append({"role": "assistant", "content": full[:begun]})
        asks["prompt"] = raw + full[:begun]
    if cap is not None:
        asks |= {"options": {"num_predict": cap}, "max_tokens": cap}
    body = json.dumps({**asks, **USAGE}).encode()
    seen = went_on(path, body, cuts)
    whole = b"".join(answer(path, body, 0))
    if seen:
        text, thinking, reason, tokens = spoken(path, whole)
        # A node that ends by itself with its last token calls it an end, and one that is asked
        # for no more a limit.
        reason = "length" if cap == tokens and b'"length"' in seen else reason
        assert spoken(path, seen) == (text, thinking, reason, tokens)
        assert len({e["id"] for e in map(decoded, seen.split(b"\n")) if "id" in e}) <= 1


def decoded(one: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(one.removeprefix(b"data: ")) if b"{" in one else {}
    return found
