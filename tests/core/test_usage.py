"""Counts and durations out of a final record."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.usage import Usage, read

RECORDS: dict[str, tuple[bytes, Usage]] = {
    "chat": (
        (
            b'{"model":"m","done":true,"done_reason":"stop","total_duration":9000000000,'
            b'"load_duration":2500000000,"prompt_eval_count":26,"prompt_eval_duration":1,'
            b'"eval_count":298,"eval_duration":4000000000}\n'
        ),
        Usage(26, 298, 2.5, 4.0),
    ),
    "generate with a long context": (
        b'{"done":true,"context":['
        + b"1," * 200_000
        + b'1],"load_duration":0,"prompt_eval_count":1,"eval_count":2,"eval_duration":3}\n',
        Usage(1, 2, 0.0, 3e-9),
    ),
    "embed": (b'{"embeddings":[[0.1]],"prompt_eval_count":5}', Usage(prompt_tokens=5)),
    "openai": (
        (
            b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,'
            b'"total_tokens":7}}\n\ndata: [DONE]\n\n'
        ),
        Usage(3, 4),
    ),
    "openai with blanks": (b'"usage": {"prompt_tokens": 3, "completion_tokens": 4}', Usage(3, 4)),
    "anthropic: the estimate comes first, the truth last": (
        (
            b'data: {"usage":{"input_tokens":9,"output_tokens":0}}\n\n'
            b'event: message_delta\ndata: {"usage":{"input_tokens":5,"output_tokens":6}}\n\n'
        ),
        Usage(5, 6),
    ),
    "nothing": (b"", Usage()),
    "no counts": (b'{"embedding":[0.5]}', Usage()),
    "null": (b'"usage":null', Usage()),
    "text that looks like a count": (b'{"content":"\\"eval_count\\":5"}', Usage()),
    "another field's ending": (b'{"my_eval_count":5}', Usage()),
    "too long a number": (b'{"eval_count":' + b"9" * 40 + b"}", Usage()),
}


@pytest.mark.parametrize(("record", "usage"), RECORDS.values(), ids=RECORDS)
def test_usage(record: bytes, usage: Usage) -> None:
    assert read(record) == usage


@given(st.binary() | st.text('"eval_count:0123456789 ').map(str.encode))
def test_any_bytes_can_be_read(record: bytes) -> None:
    assert isinstance(read(record), Usage)
