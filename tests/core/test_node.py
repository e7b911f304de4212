"""One node: what its probes make of its health, and what it has."""

import itertools

import pytest

from router.core.names import parse
from router.core.node import TRANSITIONS, Node
from router.core.types import Health, NodeSpec, Sign
from tests.core import build
from tests.core.build import felt, models, seen, spec

SIGNS = {"g": Sign.GOOD, "b": Sign.BAD, "r": Sign.REFUSED}
HEALTH = {"?": Health.UNKNOWN, "+": Health.UP, "-": Health.DOWN}


def trail(signs: str, up_after: int = 2, down_after: int = 3) -> str:
    """The health after each sign, one mark each."""
    node = Node(spec("n"), "default", now=0.0)
    marks = {health: mark for mark, health in HEALTH.items()}
    found = ""
    for sign in signs:
        node.feel(SIGNS[sign], up_after, down_after, now=1.0)
        found += marks[node.health]
    return found


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        ("g", "+"),
        ("b", "-"),
        ("r", "-"),
        ("ggg", "+++"),
        ("gbbb", "+++-"),
        ("gbbgbb", "++++++"),
        ("gbbgbbb", "++++++-"),
        ("gr", "+-"),
        ("gbr", "++-"),
        ("gbbr", "+++-"),
        ("bgg", "--+"),
        ("rgg", "--+"),
        ("bgbgg", "----+"),
        ("bgrgg", "----+"),
        ("bbbbgg", "-----+"),
        ("grgggbb", "+--++++"),
        ("gbbbgbggbbb", "+++----+++-"),
    ],
)
def test_up_after_two_good_down_after_three_bad_or_one_refusal(signs: str, expected: str) -> None:
    assert trail(signs) == expected


@pytest.mark.parametrize(
    ("signs", "up_after", "down_after", "expected"),
    [
        ("gb", 1, 1, "+-"),
        ("bg", 1, 1, "-+"),
        ("gbb", 2, 2, "++-"),
        ("bgggg", 4, 1, "----+"),
        ("g", 5, 1, "+"),
        ("b", 1, 5, "-"),
        ("gr", 1, 5, "+-"),
    ],
)
def test_how_many_signs_it_takes_is_configured(
    signs: str, up_after: int, down_after: int, expected: str
) -> None:
    assert trail(signs, up_after, down_after) == expected


def test_the_table_has_a_row_for_every_health_and_sign() -> None:
    assert set(TRANSITIONS) == set(itertools.product(Health, Sign))


def test_nothing_leads_back_to_unknown() -> None:
    assert Health.UNKNOWN not in {health for health, _ in TRANSITIONS.values()}


def test_a_flip_is_told_once_and_dated() -> None:
    node = Node(spec("n"), "default", now=1.0)
    assert node.feel(Sign.GOOD, 2, 3, now=5.0) == (Health.UNKNOWN, Health.UP)
    assert node.since == 5.0
    assert node.feel(Sign.GOOD, 2, 3, now=9.0) == (Health.UP, Health.UP)
    assert node.since == 5.0


def test_a_node_is_suspect_until_up_and_after_a_probe_that_failed() -> None:
    node = Node(spec("n"), "default", now=0.0)
    suspect = [node.suspect]
    for sign in "gbgrgg":
        node.feel(SIGNS[sign], 2, 3, now=0.0)
        suspect.append(node.suspect)
    assert suspect == [True, False, True, False, True, True, False]


@pytest.mark.parametrize(
    ("in_flight", "slots", "weight", "load"),
    [(0, 1, 1.0, 0.0), (3, 1, 1.0, 3.0), (4, 4, 1.0, 1.0), (4, 1, 2.0, 2.0), (6, 2, 1.5, 2.0)],
)
def test_load_is_in_flight_for_the_nodes_size(
    in_flight: int, slots: int, weight: float, load: float
) -> None:
    node = build.node(spec("n", slots=slots, weight=weight), in_flight=in_flight)
    assert node.load(now=0.0, slow_start_s=30.0) == load


KEYS = ("llama3:8b", "llama3:70b", "llama3.1:latest", "phi:latest", "me/llama3:8b", "hf.co/a/b:q4")


@pytest.mark.parametrize(
    ("globs", "usable"),
    [
        ([], KEYS),
        (["*"], KEYS),
        (["llama3*"], ["llama3:8b", "llama3:70b", "llama3.1:latest"]),
        (["LLAMA3:*"], ["llama3:8b", "llama3:70b"]),
        (["llama3*", "!*:70b"], ["llama3:8b", "llama3.1:latest"]),
        (["!*:70b", "llama3*"], ["llama3:8b", "llama3.1:latest"]),
        (["!*:70B"], [key for key in KEYS if key != "llama3:70b"]),
        (["!llama3*", "!phi*"], ["me/llama3:8b", "hf.co/a/b:q4"]),
        (["phi*", "hf.co/*"], ["phi:latest", "hf.co/a/b:q4"]),
        (["phi*", "!phi*"], []),
        (["llama3:[0-9]b"], ["llama3:8b"]),
        (["llama3:?b"], ["llama3:8b"]),
        (["phi"], ["phi:latest"]),
        (["!phi", "phi", "llama3"], []),
        (["!*"], []),
    ],
    ids=str,
)
def test_models_says_which_of_a_nodes_models_may_be_used(
    globs: list[str], usable: list[str]
) -> None:
    node = build.node(spec("n", models=tuple(globs)), *KEYS)
    node.learn(seen(*KEYS, resident=KEYS))
    assert list(node.present) == list(usable)
    assert list(node.resident) == list(usable)


def test_new_globs_count_at_once_and_hide_nothing_for_good() -> None:
    node = build.node(spec("n", models=("phi*",)), *KEYS)
    node.configure(spec("n", models=("!phi*",)), "other")
    assert "phi:latest" not in node.present
    assert "llama3:8b" in node.present
    node.configure(spec("n"), "default")
    assert list(node.present) == list(KEYS)


@pytest.mark.parametrize(
    ("model", "serves"),
    [
        ("phi", True),
        ("PHI:latest", True),
        ("phi:local", True),
        ("phi:3b", False),
        ("llama3", False),
        ("kimi:cloud", True),
        ("gpt-oss:20b-cloud", True),
    ],
)
def test_a_node_serves_what_it_has_and_any_cloud_model(model: str, serves: bool) -> None:
    assert build.node(spec("n"), "phi:latest").serves(parse(model)) is serves


def test_a_request_without_a_model_is_served_by_any_node() -> None:
    assert build.node(spec("n", models=("!*",))).serves(None)


@pytest.mark.parametrize(
    ("globs", "model", "serves"),
    [
        (["llama3*"], "gpt-oss:20b-cloud", False),
        (["gpt-oss*"], "gpt-oss:20b-cloud", True),
        (["!*cloud"], "gpt-oss:20b-cloud", False),
        (["!*cloud"], "kimi:cloud", False),
        (["!phi*"], "kimi:cloud", True),
    ],
    ids=str,
)
def test_models_holds_for_cloud_models_too(globs: list[str], model: str, serves: bool) -> None:
    assert build.node(spec("n", models=tuple(globs))).serves(parse(model)) is serves


def test_what_a_probe_did_not_learn_stays() -> None:
    node = build.node(spec("n"))
    assert node.learn(seen("a:latest", resident=["a:latest"], version="0.5.0"))
    assert not node.learn(felt(Sign.BAD))
    assert node.version == "0.5.0"
    assert node.present == node.resident == models(["a:latest"])


def test_only_news_is_a_change() -> None:
    node = build.node(spec("n"))
    news = [seen("a:latest"), seen("a:latest", resident=[]), seen("a:latest", version="0.5.0")]
    assert [node.learn(seen) for seen in news] == [True, False, True]
    assert not node.learn(news[-1])
    assert node.learn(seen())
    assert node.present == {}


def test_repr_tells_the_state() -> None:
    node = Node(spec("gpu-1"), "default", now=0.0)
    assert repr(node) == "<gpu-1 unknown 0 in flight>"
    assert repr(build.node(spec("gpu-1"), in_flight=2)) == "<gpu-1 up 2 in flight>"


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("http://10.0.0.11:11434", "10.0.0.11:11434"),
        ("http://plain.example.com", "plain.example.com"),
        ("https://ollama.example.com", "ollama.example.com"),
        ("https://ollama.example.com:80", "ollama.example.com:80"),
        ("http://ollama.example.com:443", "ollama.example.com:443"),
        ("http://[fd00::1]:11434", "[fd00::1]:11434"),
        ("http://[fd00::1]", "[fd00::1]"),
        ("http://gateway.example.com:8000/gpu-7", "gateway.example.com:8000"),
    ],
)
def test_a_node_is_told_its_own_authority(url: str, authority: str) -> None:
    assert spec("n", url).authority == authority


def test_headers_of_a_node_are_not_shown() -> None:
    headers = (("Authorization", "Bearer secret"),)
    shown = repr(NodeSpec("n", "http://n:1", "http", "n", 1, headers=headers))
    assert "secret" not in shown
