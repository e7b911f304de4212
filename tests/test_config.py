"""router.yaml becomes a frozen value, or every mistake in it at once with its place."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router import config
from router.changes import changes
from router.errors import ConfigError
from router.settings import Config
from tests.configs import (
    ENV,
    HOSTPORT,
    ITSELF,
    LEVELS,
    NODE_KEYS,
    NODES,
    ROOT_KEYS,
    SECRET,
    TEXT,
    mistakes,
    read,
)


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    assert mistakes("""
        listen: [127.0.0.1:11435, 11436]
        nodes:
          - http://127.0.0.1:11435
          - name: gpu
            url: 10.0.0.1:1
            slots: 0
            slots: 1
          - {name: GPU, url: "10.0.0.1:1", headers: {A: "${NOPE}"}, nme: x}
        aliases:
          a: a
        log: {level: loud}
        prob: {}
    """) == [
        f"2:27: listen[1]: {TEXT}, found 11436",
        f"4:5: nodes[0]: {ITSELF} (listen[0])",
        "7:12: nodes[1].slots: at least 1 is expected, found 0",
        "8:5: nodes[1].slots: this key stands twice, first in line 7: keep one",
        "9:12: nodes[2].name: the same name as nodes[1]: give it another",
        "9:22: nodes[2].url: the same address as nodes[1]: keep one",
        "9:49: nodes[2].headers.A: the environment has no variable NOPE",
        f"9:61: nodes[2].nme: unknown key (did you mean name?); {NODE_KEYS}",
        "11:6: aliases.a: an alias cannot name itself",
        f"12:14: log.level: {LEVELS}, found 'loud'",
        f"13:1: prob: unknown key (did you mean probe?); {ROOT_KEYS}",
    ]


def test_load_reads_the_file_it_is_given(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text(NODES)
    assert config.load(file, {}) == read(NODES)
    file.write_text("nodes: []")
    with pytest.raises(ConfigError, match=re.escape(f"{file}:1:8: nodes: a list of at least one")):
        config.load(file, {})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("missing.yaml", "No such file or directory"), ("", "Is a directory")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, expected: str) -> None:
    path = tmp_path / name
    with pytest.raises(ConfigError) as caught:
        config.load(path, {})
    assert caught.value.mistakes == [f"{path}: cannot be read: {expected}"]


def test_a_path_that_is_none_is_a_mistake_too() -> None:
    with pytest.raises(ConfigError, match="this is no path"):
        config.load(Path("a\0b"), {})


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "http://127.0.0.1:11434"),
        ({"OLLAMA_HOST": ""}, "http://127.0.0.1:11434"),
        ({"OLLAMA_HOST": "gpu-1"}, "http://gpu-1:11434"),
        ({"OLLAMA_HOST": "gpu-1:8080"}, "http://gpu-1:8080"),
        ({"OLLAMA_HOST": ":8080"}, "http://127.0.0.1:8080"),
        ({"OLLAMA_HOST": " 'gpu-1:8080' "}, "http://gpu-1:8080"),
        ({"OLLAMA_HOST": "http://gpu-1"}, "http://gpu-1"),
        ({"OLLAMA_HOST": "https://gpu-1/ollama/"}, "https://gpu-1/ollama"),
        ({"OLLAMA_HOST": "https://gpu-1:8443"}, "https://gpu-1:8443"),
        ({"OLLAMA_HOST": "0.0.0.0"}, "http://127.0.0.1:11434"),
        ({"OLLAMA_HOST": "http://0.0.0.0:9/x"}, "http://127.0.0.1:9/x"),
        ({"OLLAMA_HOST": "::1"}, "http://[::1]:11434"),
        ({"OLLAMA_HOST": "::"}, "http://[::1]:11434"),
        ({"OLLAMA_HOST": "[::]:9"}, "http://[::1]:9"),
        ({"OLLAMA_HOST": "[fd00::7]:9"}, "http://[fd00::7]:9"),
        ({"OLLAMA_API_BASE": "http://a:1", "OLLAMA_HOST": "b"}, "http://a:1"),
        ({"OLLAMA_API_BASE": "", "OLLAMA_HOST": "b"}, "http://b:11434"),
    ],
)
def test_without_a_file_the_environment_names_the_node(env: dict[str, str], expected: str) -> None:
    found = config.load(None, env)
    assert [spec.url for pool in found.pools for spec in pool.nodes] == [expected]
    assert found.timeouts.first_byte_s == 600


def test_without_a_file_the_environment_sets_the_first_byte_limit() -> None:
    assert config.from_environment({"OLLAMA_TIMEOUT": "12.5"}).timeouts.first_byte_s == 12.5


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"OLLAMA_HOST": f"ftp://{SECRET}"}, ["OLLAMA_HOST: an http or https URL is expected"]),
        ({"OLLAMA_HOST": f"{SECRET}:x"}, [f"OLLAMA_HOST: {HOSTPORT}"]),
        ({"OLLAMA_HOST": "0.0.0.0:11435"}, [f"OLLAMA_HOST: {ITSELF}"]),
        ({"OLLAMA_TIMEOUT": SECRET}, ["OLLAMA_TIMEOUT: a number is expected"]),
        (
            {"OLLAMA_API_BASE": "http://localhost:11436", "OLLAMA_TIMEOUT": "0"},
            ["OLLAMA_TIMEOUT: more than 0 is expected", f"OLLAMA_API_BASE: {ITSELF}"],
        ),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(
    env: dict[str, str], expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(None, env)
    assert caught.value.mistakes == expected


SECRET_PLACES = [
    f"nodes: [{{url: h, headers: {{A: '{SECRET}'}}}}]",
    "nodes: [{url: h, headers: {A: 'Bearer ${TOKEN}'}}]",
    NODES + f"admin: {{token: '{SECRET}'}}",
    NODES + "admin: {token: '${TOKEN}'}",
    "nodes: [{url: h, labels: {a: '${TOKEN}'}}]",
    "nodes: [{url: 'http://${TOKEN}', name: '${TOKEN}', models: ['${TOKEN}']}]",
    NODES + "aliases: {a: '${TOKEN}'}\ncors: {origins: ['http://${TOKEN}']}",
]


@pytest.mark.parametrize("text", SECRET_PLACES)
def test_a_secret_is_never_in_what_is_printed(text: str) -> None:
    found = read(text)
    sections = [value for _, value in found] + list(found.nodes)
    difference = changes(read("nodes: [x]\naliases: {b: c}"), found)
    settings = (difference.settings, difference.restart)
    models = [value for value in sections if not isinstance(value, dict | tuple)]
    for printed in [found, *models, settings, found.nodes]:
        assert SECRET not in repr(printed)
        assert SECRET not in str(printed)
    assert repr(found) == "Config(pools=1, nodes=1)"


SPOILED = {
    "unquoted": ("'", ""),
    "badly keyed": ("{a: ", "{a b: "),
    "followed": ("TOKEN}", "TOKEN} \\n @/:é?"),
    "listed": ("'${TOKEN}'", "['${TOKEN}']"),
    "listed as it is": (f"'{SECRET}'", f"['{SECRET}']"),
    "not ASCII": (f"'{SECRET}'", f"'{SECRET} é'"),
    "misspelt header": ("headers", "header"),
    "misspelt token": ("token", "tken"),
    "without a colon": ("{A: '", "{'Bearer "),
    "doubled": ("nodes", "nodes: [x]\nnodes"),
}


@pytest.mark.parametrize("text", SECRET_PLACES)
@pytest.mark.parametrize(("old", "new"), SPOILED.values(), ids=SPOILED)
def test_a_secret_is_never_in_a_mistake(text: str, old: str, new: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text.replace(old, new) + "\nunknown: 1")
    error = caught.value
    assert error.mistakes
    assert SECRET not in str(error) + repr(error)
    assert error.__context__ is None


SCALARS = st.sampled_from(["a", "5", "-1", "1.5", "on", "~", "''", "[]", "{}", "auto", "8MB"])
TEXTS = st.sampled_from(["'${TOKEN}'", "'${NOPE}'", "h:1", "http://h", "'[::1]:1'", "llama3@h"])
TRICKS = st.sampled_from(["127.0.0.1:11435", "!x", "*a", "&a b", "'a\\0'", '"\\ud800"'])
SECTIONS = sorted(Config.model_json_schema()["properties"])
KEYS = st.sampled_from(
    [
        *SECTIONS,
        "name",
        "url",
        "slots",
        "weight",
        "models",
        "labels",
        "headers",
        "tls",
        "token",
        "x",
    ]
)
TREES = st.recursive(
    SCALARS | TEXTS | TRICKS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(KEYS, inner), max_size=4).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=12,
)
FILES = st.lists(st.tuples(KEYS, TREES), max_size=6).map(
    lambda pairs: "\n".join(f"{key}: {value}" for key, value in pairs)
)


def outcome(make: Callable[[], Config]) -> Config | ConfigError:
    try:
        return make()
    except ConfigError as error:
        return error


@given(st.text() | TREES | FILES)
def test_any_text_is_a_configuration_or_mistakes(text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    found = outcome(lambda: config.parse(raw, "r.yaml", ENV))
    assert SECRET not in repr(found) + str(found)
    if isinstance(found, ConfigError):
        assert found.mistakes
        assert len(set(found.mistakes)) == len(found.mistakes)
    else:
        assert found.topology.pools


VARIABLES = st.sampled_from(["OLLAMA_API_BASE", "OLLAMA_HOST", "OLLAMA_TIMEOUT"])


@given(st.dictionaries(VARIABLES, st.text()))
def test_any_environment_is_a_configuration_or_mistakes(env: dict[str, str]) -> None:
    found = outcome(lambda: config.from_environment(env))
    if isinstance(found, ConfigError):
        assert all(line.startswith("OLLAMA_") for line in found.mistakes)
    else:
        assert len(found.pools) == 1
