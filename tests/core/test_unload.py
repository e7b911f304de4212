"""What only unloads a model."""

import pytest

from router.core import dialect, unload

CHAT = dialect.find("/api/chat")
GENERATE = dialect.find("/api/generate")
EMBED = dialect.find("/api/embed")


@pytest.mark.parametrize("keep_alive", [b"0", b"0.0", b"-0", b'"0"', b'"0s"', b'"0h0m"', b'".0s"'])
@pytest.mark.parametrize("content", [b"", b"null", b'""', b"[]", b"[ ]"])
def test_a_keep_alive_of_nothing_without_content_unloads(keep_alive: bytes, content: bytes) -> None:
    assert unload.asked(keep_alive, content)


@pytest.mark.parametrize(
    "keep_alive",
    [b"1", b"-1", b'"5m"', b"null", b"false", b'""', b'"0x"', b"{}", b"", b"nope", b'"' * 70],
)
def test_any_other_keep_alive_does_not(keep_alive: bytes) -> None:
    assert not unload.asked(keep_alive, b"")


@pytest.mark.parametrize("content", [b'"x"', b'[{"role":"user"}]', b'"' + b"x" * 99 + b'"', b"{"])
def test_with_content_the_answer_comes_first(content: bytes) -> None:
    assert not unload.asked(b"0", content)


@pytest.mark.parametrize(
    ("path", "body", "unloads"),
    [
        ("/api/chat", b'{"model":"m","keep_alive":0}', True),
        ("/api/chat", b'{"model":"m","messages":[],"keep_alive":0}', True),
        ("/api/chat", b'{"model":"m","messages":[1],"keep_alive":0}', False),
        ("/api/generate", b'{"model":"m","keep_alive":"0s"}', True),
        ("/api/generate", b'{"model":"m","prompt":"x","keep_alive":0}', False),
        ("/api/generate", b'{"model":"m","Keep_Alive":0}', True),
        ("/api/generate", b'{"model":"m","PROMPT":"x","keep_alive":0}', False),
        ("/api/embed", b'{"model":"m","keep_alive":0}', True),
        ("/api/embed", b'{"model":"m","input":"x","keep_alive":0}', False),
        ("/api/show", b'{"model":"m","keep_alive":0}', False),
        ("/v1/chat/completions", b'{"model":"m","keep_alive":0}', False),
        ("/api/generate", b'{"model":"m"}', False),
    ],
)
def test_bodies(path: str, body: bytes, unloads: bool) -> None:
    route = dialect.find(path)
    assert route is not None
    assert dialect.parse(route, body).unloads is unloads
    assert dialect.parse(route, body + b" trailing").unloads is unloads
