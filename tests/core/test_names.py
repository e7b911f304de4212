"""Model names as Ollama reads them, and pins."""

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from router.core.names import BadName, Name, Pin, parse, pinned, split_pin, without_prefix
from router.core.types import NodeSpec
from tests.core.build import spec

# How a node lists the model that the text names.
KEYS = {
    "llama3": "llama3:latest",
    "llama3:latest": "llama3:latest",
    "llama3:8b": "llama3:8b",
    "LLaMA3:8B": "llama3:8b",
    "  llama3:8b\n": "llama3:8b",
    "some/nsm:q4": "some/nsm:q4",
    "SOME/nsm": "some/nsm:latest",
    "library/llama3": "llama3:latest",
    "Library/LLama3": "llama3:latest",
    "registry.ollama.ai/library/llama3:8b": "llama3:8b",
    "REGISTRY.ollama.ai/me/llama3": "me/llama3:latest",
    "https://registry.ollama.ai/library/llama3": "llama3:latest",
    "hf.co/a/b:Q4": "hf.co/a/b:q4",
    "hf.co/ORG/hfm:Q8_0": "hf.co/org/hfm:q8_0",
    "hf.co/library/b": "hf.co/library/b:latest",
    "huggingface.co/a/b": "huggingface.co/a/b:latest",
    "localhost:5000/ns/model": "localhost:5000/ns/model:latest",
    "localhost:5000/ns/model:tag": "localhost:5000/ns/model:tag",
    "http://localhost:5000/ns/model:tag": "localhost:5000/ns/model:tag",
    "my-cloud": "my-cloud:latest",
    "_x": "_x:latest",
    "1x:_1": "1x:_1",
    "a.b-c_d:e.f-g_h": "a.b-c_d:e.f-g_h",
    "n-s_1/m": "n-s_1/m:latest",
    "m" * 80 + ":" + "t" * 80: "m" * 80 + ":" + "t" * 80,
    "n" * 80 + "/m": "n" * 80 + "/m:latest",
    "h" * 350 + "/n/m": "h" * 350 + "/n/m:latest",
}

NO_NAMES = {
    "empty": "",
    "blank": " \t",
    "tag without a model": ":8b",
    "colon without a tag": "llama3:",
    "two tags": "a:b:c",
    "no namespace": "/llama3",
    "no model": "ns/",
    "no host": "/ns/m",
    "dot in a namespace": "hf.co/model",
    "colon in a namespace": "localhost:5000/model",
    "four parts": "a/b/c/d",
    "a leading dot": ".m",
    "a leading dash": "-m",
    "a tag with a leading dash": "m:-t",
    "a host with a leading dot": ".h/n/m",
    "a blank inside": "lla ma3",
    "a newline inside": "llama3\n:8b",
    "a letter that is not ASCII": "llamä3",
    "a digit that is not ASCII": "llama\u0663",
    "a query": "llama3?x",
    "an at sign": "llama3@sha256",
    "a path": "../m",
    "a NUL": "m\0",
    "model too long": "m" * 81,
    "tag too long": "m:" + "t" * 81,
    "namespace too long": "n" * 81 + "/m",
    "host too long": "h" * 351 + "/n/m",
    "a scheme and nothing else": "https://",
    "a scheme that does not lead": "ns/https://m",
    "a scheme that is not of letters": "h1b://host/ns/m",
    "two schemes": "http://http://h/n/m",
    "local and cloud": "x:cloud:local",
    "cloud and local": "x:local:cloud",
    "cloud twice": "x:cloud:cloud",
    "local twice": "x:local:local",
    "a cloud tag, then local": "x:20b-cloud:local",
    "a cloud tag, then cloud": "x:20b-cloud:cloud",
    "a tag that is only the cloud ending": "x:-cloud",
    "a source and no name": ":cloud",
}

# text: (source, key). A node lists the stub of a pulled cloud model with its cloud ending.
SOURCES = {
    "llama3:8b": ("", "llama3:8b"),
    "llama3:local": ("local", "llama3:latest"),
    "llama3:8b:local": ("local", "llama3:8b"),
    "llama3:8b:LOCAL": ("local", "llama3:8b"),
    "hf.co/a/b:Q4:local": ("local", "hf.co/a/b:q4"),
    "kimi:cloud": ("cloud", "kimi:cloud"),
    "KIMI:Cloud": ("cloud", "kimi:cloud"),
    "ns/kimi:cloud": ("cloud", "ns/kimi:cloud"),
    "gpt-oss:20b-cloud": ("cloud", "gpt-oss:20b-cloud"),
    "gpt-oss:20b-CLOUD": ("cloud", "gpt-oss:20b-cloud"),
    "gpt-oss:20b:cloud": ("cloud", "gpt-oss:20b-cloud"),
    "hf.co/a/b:q4-cloud": ("cloud", "hf.co/a/b:q4-cloud"),
    "localhost:5000/ns/m:cloud": ("cloud", "localhost:5000/ns/m:cloud"),
    "my-cloud": ("", "my-cloud:latest"),
    "localhost:5000/ns/m-cloud": ("", "localhost:5000/ns/m-cloud:latest"),
    "x:cloudy": ("", "x:cloudy"),
    "x:cloud-8b": ("", "x:cloud-8b"),
    "x:20bcloud": ("", "x:20bcloud"),
    "cloud": ("", "cloud:latest"),
    "local/m": ("", "local/m:latest"),
}


@pytest.mark.parametrize(("text", "key"), KEYS.items(), ids=[text[:40] for text in KEYS])
def test_key_is_what_a_node_lists(text: str, key: str) -> None:
    assert parse(text).key == key


@pytest.mark.parametrize("text", NO_NAMES.values(), ids=NO_NAMES)
def test_what_ollama_refuses_is_no_name(text: str) -> None:
    with pytest.raises(BadName):
        parse(text)


@pytest.mark.parametrize(("text", "expected"), SOURCES.items(), ids=SOURCES)
def test_source_suffix(text: str, expected: tuple[str, str]) -> None:
    name = parse(text)
    assert (name.source, name.key) == expected
    assert name.cloud is (name.source == "cloud")


def test_text_is_as_written_but_trimmed() -> None:
    assert parse(" LLaMA3:8B ").text == "LLaMA3:8B"
    assert parse("gpt-oss:20b-cloud").text == "gpt-oss:20b-cloud"


def test_a_model_and_its_cloud_twin_are_two_models() -> None:
    assert parse("kimi").key != parse("kimi:cloud").key


def test_name_is_latest_and_no_other_tag() -> None:
    assert parse("x").key == parse("x:latest").key
    assert parse("x").key != parse("x:8b").key


_FIRST = st.sampled_from(string.ascii_letters + string.digits + "_")


def _part(also: str) -> st.SearchStrategy[str]:
    rest = st.text(string.ascii_letters + string.digits + "_-" + also, max_size=12)
    return st.builds(str.__add__, _FIRST, rest)


def _no_source(tag: str) -> bool:
    return tag.lower() not in ("cloud", "local") and not tag.lower().endswith("-cloud")


_MODELS, _NAMESPACES, _HOSTS = _part("."), _part(""), _part(".:")
_TAGS = _part(".").filter(_no_source)
_NAMES = st.builds(
    lambda where, model, tag: f"{where}{model}{tag}",
    st.one_of(
        st.just(""),
        _NAMESPACES.map(lambda namespace: f"{namespace}/"),
        st.builds(lambda host, namespace: f"{host}/{namespace}/", _HOSTS, _NAMESPACES),
    ),
    _MODELS,
    st.one_of(st.just(""), _TAGS.map(lambda tag: f":{tag}")),
)
_ODD = st.text("aZ0_-.:/@ []%?#\\\n\u0130é\0") | st.text()


@given(_ODD)
@example("\u0130:cloud")
@example("://")
@example(":" * 100)
def test_any_text_is_a_name_or_a_bad_name(text: str) -> None:
    try:
        name = parse(text)
    except BadName:
        return
    assert name.text == text.strip()
    assert name.key == name.key.lower()


@given(_NAMES)
def test_every_name_of_the_grammar_is_read_without_regard_to_case(text: str) -> None:
    assert parse(text).key == parse(text.upper()).key == parse(text.lower()).key


@given(_NAMES, st.sampled_from(["", ":cloud", ":local"]))
def test_a_key_names_itself(text: str, source: str) -> None:
    key = parse(text + source).key
    again = parse(key)
    assert again == Name(key, key, "cloud" if source == ":cloud" else "")


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("ollama/llama3:8b", "llama3:8b"),
        ("OLLAMA/llama3", "llama3"),
        ("ollama/hf.co/a/b", "hf.co/a/b"),
        ("ollama/", ""),
        ("llama3", None),
        ("ollama", None),
        ("x/ollama/m", None),
        ("", None),
    ],
)
def test_without_prefix(text: str, rest: str | None) -> None:
    assert without_prefix(text) == rest


# pin: (scheme, host, port). Default ports are those of Ollama's own client.
PINS: dict[str, tuple[str | None, str | None, int]] = {
    "gpu-1": (None, "gpu-1", 11434),
    "GPU-1.Example.com": (None, "gpu-1.example.com", 11434),
    "10.0.0.11": (None, "10.0.0.11", 11434),
    "10.0.0.11:8080": (None, "10.0.0.11", 8080),
    "host:1": (None, "host", 1),
    "host:65535": (None, "host", 65535),
    "http://host": ("http", "host", 80),
    "http://host:11434": ("http", "host", 11434),
    "https://host": ("https", "host", 443),
    "https://host:8443": ("https", "host", 8443),
    "[::1]": (None, "::1", 11434),
    "[::1]:8080": (None, "::1", 8080),
    "http://[FD00::1]": ("http", "fd00::1", 80),
    "https://[fd00:0:0::1]:8443": ("https", "fd00::1", 8443),
}

# These can only be a node's name, if there is one that is called so.
ONLY_NAMES = ["sha256:abc", "node2:cloud", "host:", "host:123456", "host:8080x"]

NO_PINS = {
    "nothing behind": "m@",
    "blanks behind": "m@  ",
    "nothing before": "@gpu-1",
    "only an at sign": "@",
    "user": "m@me@host",
    "user and password": "m@http://me:secret@host",
    "path": "m@host/path",
    "path of a url": "m@http://host/path",
    "root path": "m@http://host/",
    "query": "m@http://host?x=1",
    "fragment": "m@http://host#x",
    "query without a url": "m@host?x",
    "fragment without a url": "m@host#x",
    "back slash": "m@host\\x",
    "other scheme": "m@ftp://host",
    "scheme alone": "m@http://",
    "no host": "m@http://:80",
    "port alone": "m@:80",
    "port 0": "m@host:0",
    "port 65536": "m@host:65536",
    "port of a url not a number": "m@http://host:abc",
    "port not ASCII": "m@host:\u0661\u0662",
    "blank inside": "m@ho st",
    "v6 without brackets": "m@::1",
    "v6 unfinished": "m@[::1",
    "v6 not one": "m@[12345::]",
    "v4 in brackets": "m@[10.0.0.1]",
    "name in brackets": "m@[host]",
    "empty brackets": "m@[]",
    "something behind the brackets": "m@[::1]x",
    "accident with a scheme": "a@b://registry.ollama.ai/library/fake:latest",
}


@pytest.mark.parametrize(("text", "expected"), PINS.items(), ids=PINS)
def test_pin(text: str, expected: tuple[str | None, str | None, int]) -> None:
    left, pin = split_pin(f"llama3:8b@{text}")
    assert left == "llama3:8b"
    assert pin == Pin(text, *expected)


@pytest.mark.parametrize("text", ONLY_NAMES)
def test_pin_that_can_only_be_a_name(text: str) -> None:
    assert split_pin(f"m@{text}") == ("m", Pin(text))


@pytest.mark.parametrize("text", NO_PINS.values(), ids=NO_PINS)
def test_what_is_no_pin_makes_a_bad_name(text: str) -> None:
    with pytest.raises(BadName):
        split_pin(text)


@pytest.mark.parametrize(
    ("text", "left", "pin"),
    [
        ("llama3", "llama3", None),
        ("  llama3 ", "llama3", None),
        ("", "", None),
        ("  m@gpu-1\n", "m", "gpu-1"),
        ("gpt-oss:20b-cloud@node2", "gpt-oss:20b-cloud", "node2"),
        ("m:local@node2", "m:local", "node2"),
        ("hf.co/a/b:Q4@node2", "hf.co/a/b:Q4", "node2"),
        ("https://hf.co/a/b@node2", "https://hf.co/a/b", "node2"),
        ("https://hf.co/a/b@https://node2", "https://hf.co/a/b", "https://node2"),
        ("https://hf.co/a/b", "https://hf.co/a/b", None),
    ],
)
def test_split_is_at_the_first_at_sign_behind_a_scheme(
    text: str, left: str, pin: str | None
) -> None:
    found_left, found = split_pin(text)
    assert found_left == left
    assert (found and found.text) == pin


@given(_ODD)
@example("a@[::1%]")
@example("a@[fe80::1%1]")
@example("a@[::ffff:1.2.3.4]")
def test_any_text_splits_or_is_a_bad_name(text: str) -> None:
    try:
        left, pin = split_pin(text)
    except BadName:
        return
    if pin is None:
        assert left == text.strip()
    else:
        before, _, after = text.strip().rpartition("@")
        assert (left, pin.text) == (before.strip(), after.strip())
        assert "@" not in pin.text
        assert pin.host is None or 1 <= pin.port <= 65535


@given(_NAMES, st.sampled_from([*PINS, *ONLY_NAMES]))
def test_a_pin_is_split_off_every_name(name: str, pin: str) -> None:
    left, found = split_pin(f"{name}@{pin}")
    assert left == name
    assert found is not None
    assert found.text == pin


NODES = [
    spec("gpu-1", "http://10.0.0.11:11434"),
    spec("gpu-2", "http://10.0.0.12:8080"),
    spec("edge", "https://ollama.example.com"),
    spec("plain", "http://plain.example.com"),
    spec("six", "http://[fd00::1]:11434"),
    spec("deep", "http://gateway.example.com:8000/gpu-7"),
    spec("sha256:abc", "http://odd.example.com"),
    spec("twin-http", "http://twin.example.com:9000"),
    spec("twin-https", "https://twin.example.com:9000"),
]

FINDS: dict[str, list[str]] = {
    "gpu-1": ["gpu-1"],
    "GPU-1": ["gpu-1"],
    "10.0.0.11": ["gpu-1"],
    "10.0.0.11:11434": ["gpu-1"],
    "http://10.0.0.11:11434": ["gpu-1"],
    "https://10.0.0.11:11434": [],
    "http://10.0.0.11": [],
    "10.0.0.12": [],
    "10.0.0.12:8080": ["gpu-2"],
    "ollama.example.com": [],
    "ollama.example.com:443": ["edge"],
    "OLLAMA.example.com:443": ["edge"],
    "https://ollama.example.com": ["edge"],
    "https://ollama.example.com:443": ["edge"],
    "http://ollama.example.com:443": [],
    "http://plain.example.com": ["plain"],
    "plain.example.com:80": ["plain"],
    "[fd00::1]": ["six"],
    "[FD00:0:0:0::1]:11434": ["six"],
    "http://[fd00::1]:11434": ["six"],
    "[fd00::1]:80": [],
    "[fd00::2]": [],
    "gateway.example.com:8000": ["deep"],
    "sha256:abc": ["sha256:abc"],
    "sha256:abd": [],
    "twin.example.com:9000": ["twin-http", "twin-https"],
    "https://twin.example.com:9000": ["twin-https"],
    "gpu": [],
    "gpu-10": [],
    "localhost": [],
}


@pytest.mark.parametrize(("text", "found"), FINDS.items(), ids=FINDS)
def test_pin_finds_only_configured_nodes(text: str, found: list[str]) -> None:
    _, pin = split_pin(f"m@{text}")
    assert pin is not None
    assert [spec.name for spec in pinned(pin, NODES)] == found


def test_a_nodes_name_goes_before_a_host() -> None:
    named = spec("10.0.0.11", "http://10.0.0.99:11434")
    assert pinned(Pin("10.0.0.11", None, "10.0.0.11", 11434), [*NODES, named]) == [named]


@pytest.mark.parametrize("node", NODES, ids=[node.name for node in NODES])
def test_every_node_is_found_by_its_whole_address(node: NodeSpec) -> None:
    host = f"[{node.host}]" if ":" in node.host else node.host
    _, pin = split_pin(f"m@{node.scheme}://{host}:{node.port}")
    assert pin is not None
    assert pinned(pin, NODES) == [node]
