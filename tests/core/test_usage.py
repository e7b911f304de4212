"""Counts and durations out of a final record."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.usage import Source, Usage, counted, read, withhold

RECORDS: dict[str, tuple[bytes, Usage]] = {
    "chat": (
        (
            b'{"model":"m","done":true,"done_reason":"stop","total_duration":9000000000,'
            b'"load_duration":2500000000,"prompt_eval_count":26,"prompt_eval_duration":1,'
            b'"eval_count":298,"eval_duration":4000000000}\n'
        ),
        Usage(26, 298, 2.5, 4.0, 1e-9, total_s=9.0),
    ),
    "generate with a long context": (
        b'{"done":true,"context":['
        + b"1," * 200_000
        + b'1],"load_duration":0,"prompt_eval_count":1,"prompt_eval_duration":4,"eval_count":2,'
        + b'"eval_duration":3}\n',
        Usage(1, 2, 0.0, 3e-9, 4e-9),
    ),
    "embed": (b'{"embeddings":[[0.1]],"prompt_eval_count":5}', Usage(prompt_tokens=5)),
    "openai": (
        (
            b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,'
            b'"total_tokens":7}}\n\ndata: [DONE]\n\n'
        ),
        Usage(3, 4),
    ),
    "openai, not streamed": (
        b'{"choices":[{}],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}',
        Usage(3, 4),
    ),
    "anthropic, not streamed": (b'{"usage":{"input_tokens":5,"output_tokens":6}}', Usage(5, 6)),
    "openai with blanks": (b'"usage": {"prompt_tokens": 3, "completion_tokens": 4}', Usage(3, 4)),
    "anthropic: the estimate comes first, the truth last": (
        (
            b'data: {"usage":{"input_tokens":9,"output_tokens":0}}\n\n'
            b'event: message_delta\ndata: {"usage":{"input_tokens":5,"output_tokens":6}}\n\n'
        ),
        Usage(5, 6),
    ),
    "anthropic: only the estimate": (
        b'event: message_start\ndata: {"message":{"usage":{"input_tokens":9}}}\n\n',
        Usage(),
    ),
    "anthropic: another event holds the word": (
        b'data: {"usage":{"input_tokens":5,"output_tokens":6}}\n\ndata: {"x":"usage"}\n\n',
        Usage(5, 6),
    ),
    "completions: zero until the last": (
        (
            b'data: {"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
            b'data: {"usage":{"prompt_tokens":0,"completion_tokens":0}}\n\ndata: [DONE]\n\n'
        ),
        Usage(3, 4),
    ),
    "completions: zero only": (
        b'data: {"usage":{"prompt_tokens":0,"completion_tokens":0}}\n\n',
        Usage(),
    ),
    "responses": (
        (
            b'event: response.completed\ndata: {"response":{"tools":[{"output_tokens":99}],'
            b'"usage":{"input_tokens":5,"output_tokens":6},"metadata":{"output_tokens":99}}}\n\n'
        ),
        Usage(5, 6),
    ),
    "responses, long": (
        (
            b'event: response.completed\ndata: {"response":{"output":"%b",'
            b'"usage":{"input_tokens":5,"output_tokens":6}}}\n\n' % (b"x" * 100_000)
        ),
        Usage(5, 6),
    ),
    "responses, not yet": (b'event: response.created\ndata: {"usage":null}\n\n', Usage()),
    "an event that cannot be read": (b'data: {"usage":{"input_tokens":9}\n\n', Usage()),
    "the end of an event": (b'xx","usage":{"input_tokens":5,"output_tokens":6}}\n\n', Usage(5, 6)),
    "nothing": (b"", Usage()),
    "no counts": (b'{"embedding":[0.5]}', Usage()),
    "null": (b'"usage":null', Usage()),
    "text that looks like a count": (b'{"content":"\\"eval_count\\":5"}', Usage()),
    "another field's ending": (b'{"my_eval_count":5}', Usage()),
    "the prompt's duration alone": (
        b'x"prompt_eval_duration":7000000000}',
        Usage(prompt_s=7.0),
    ),
    "too long a number": (b'{"eval_count":' + b"9" * 40 + b"}", Usage()),
}


@pytest.mark.parametrize(("record", "usage"), RECORDS.values(), ids=RECORDS)
def test_usage(record: bytes, usage: Usage) -> None:
    assert read(record) == usage


@given(st.binary() | st.text('"eval_count:0123456789 ').map(str.encode))
def test_any_bytes_can_be_read(record: bytes) -> None:
    assert isinstance(read(record), Usage)


@pytest.mark.parametrize(
    ("told", "waited_s"),
    [
        (Usage(total_s=9.0, load_s=2.0, prompt_s=1.0, eval_s=4.0), 2.0),
        (Usage(total_s=9.0, eval_s=4.0), 5.0),
        (Usage(total_s=4.0, eval_s=4.1), 0.0),
        (Usage(total_s=9.0), None),
        (Usage(eval_s=4.0), None),
    ],
)
def test_what_is_left_of_all_the_time_was_a_wait_for_a_slot(
    told: Usage, waited_s: float | None
) -> None:
    assert told.waited_s == waited_s


def test_chunks_count_only_where_the_node_has_not() -> None:
    assert counted(Usage(3, 4), 9) == Usage(3, 4)
    assert counted(Usage(3), 9) == Usage(3, 9, source=Source.CHUNKS)
    assert counted(Usage(), 0) == Usage()


CHUNK = b'data: {"choices":[{"delta":{"content":"\\"usage\\""}}]}\n\n'
ONLY_COUNTS = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("counts", [ONLY_COUNTS, ONLY_COUNTS.replace(b"\n", b"\r\n")])
@pytest.mark.parametrize("before", [b"", CHUNK, b": a comment\n\n" + CHUNK, b"x\r\n\r\n"])
@pytest.mark.parametrize("behind", [b"", DONE, DONE + b"\n", CHUNK + DONE])
def test_the_event_with_counts_alone_is_withheld(
    before: bytes, counts: bytes, behind: bytes
) -> None:
    assert withhold(before + counts + behind) == (before + behind, counts)


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[{"delta":{}}],"usage":{"prompt_tokens":3}}\n\n',
        b'data: {"choices":[],"usage":null}\n\n',
        b'data: {"usage":{"prompt_tokens":3}}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":3}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":3}}',
        b'data: {"choices":[],"usage":{"prompt_tokens":3}}\nid: 1\n\n',
        b'event: x\ndata: {"choices":[],"usage":{"prompt_tokens":3}}\n\n',
        b'"choices":[],"usage":{"prompt_tokens":3}}\n\n',
        CHUNK,
        b"",
    ],
)
def test_what_says_more_is_not_withheld(event: bytes) -> None:
    assert withhold(event + DONE) == (event + DONE, b"")


def test_an_event_without_an_end_is_not_withheld() -> None:
    assert withhold(ONLY_COUNTS[:-1]) == (ONLY_COUNTS[:-1], b"")
