"""Answers: the same everywhere, and continued where they were cut."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.sim import SimModel, text
from router.sim.answer import Answer, Ask, PieceKind, compose
from router.sim.prompt import MARKERS, Message, Prompt, of_messages, of_raw

MODEL = SimModel("llama3:8b")
BOUNDS = (4, 30)
CONTENT = st.text(max_size=30)
MESSAGES = st.lists(
    st.builds(Message, st.sampled_from(["user", "system", "tool"]), CONTENT), min_size=1, max_size=4
)


def ask(prompt: Prompt, **changes: object) -> Ask:
    return Ask("llama3:8b", MODEL, prompt, stream=True, **changes)  # type: ignore[arg-type]


def said(prompt: Prompt, **changes: object) -> str:
    return compose(ask(prompt, **changes), BOUNDS).joined(PieceKind.CONTENT)


@given(MESSAGES, st.floats(0, 1))
def test_trailing_assistant_message_is_continued(messages: list[Message], where: float) -> None:
    full = said(of_messages(messages))
    cut = round(where * len(full))
    begun = Message("assistant", full[:cut])
    assert said(of_messages([*messages, begun])) == full[cut:]


@given(st.text(max_size=40), st.sampled_from([*MARKERS, "\n"]), st.floats(0, 1))
def test_end_of_a_raw_prompt_is_continued(before: str, marker: str, where: float) -> None:
    full = said(of_raw(before + marker))
    cut = round(where * len(full))
    assert said(of_raw(before + marker + full[:cut])) == full[cut:]


@given(st.text(max_size=200), st.floats(0, 1))
def test_json_answer_is_continued_too(content: str, where: float) -> None:
    messages = [Message("user", content)]
    full = said(of_messages(messages), schema="json")
    cut = round(where * len(full))
    begun = Message("assistant", full[:cut])
    assert said(of_messages([*messages, begun]), schema="json") == full[cut:]


def test_raw_prompt_without_marker_is_answered_as_a_whole() -> None:
    assert of_raw("once upon a time") == Prompt("once upon a time")


def test_last_marker_counts() -> None:
    prompt = of_raw("[INST] one [/INST] two\n[INST] three [/INST] fo")
    assert (prompt.text[-7:], prompt.given) == ("[/INST]", " fo")


@given(CONTENT)
def test_another_beginning_is_continued_the_same_way_each_time(content: str) -> None:
    prompt = of_messages([Message("user", content), Message("assistant", "\x00no answer")])
    assert said(prompt) == said(prompt) != ""


@given(MESSAGES)
def test_answer_length_is_within_bounds(messages: list[Message]) -> None:
    answer = compose(ask(of_messages(messages)), BOUNDS)
    assert BOUNDS[0] <= answer.tokens <= BOUNDS[1]
    assert answer.done_reason == "stop"


def test_answer_depends_on_model_and_messages() -> None:
    def words(model: str, prompt: str) -> list[str]:
        return text.words(model, prompt, (20, 20))

    assert words("a", "p") == words("a", "p")
    assert words("a", "p") != words("b", "p")
    assert words("a", "p") != words("a", "q")


def test_answers_hold_more_than_ascii_and_no_line_break() -> None:
    sample = "".join("".join(text.words("m", str(at), (50, 50))) for at in range(50))
    for wanted in ("é", "ü", "漢", "🦙", "<b>", "&", "\u2028"):
        assert wanted in sample
    assert not set("\n\r") & set(sample)
    assert not any(marker in sample for marker in MARKERS)


@pytest.mark.parametrize(("cap", "reason"), [(3, "length"), (10, "stop"), (1000, "stop")])
def test_cap_cuts_the_answer(cap: int, reason: str) -> None:
    prompt = of_messages([Message("user", "hi")])
    answer = compose(ask(prompt, cap=cap), (10, 10))
    assert (answer.tokens, answer.done_reason) == (min(cap, 10), reason)


def test_finished_answer_has_nothing_left() -> None:
    messages = [Message("user", "hi")]
    full = said(of_messages(messages))
    answer = compose(ask(of_messages([*messages, Message("assistant", full)])), BOUNDS)
    assert answer == Answer((), "stop")


def test_thinking_comes_first_and_only_when_asked() -> None:
    prompt = of_messages([Message("user", "hi")])
    kinds = [piece.kind for piece in compose(ask(prompt, think=True), BOUNDS).pieces]
    assert kinds == sorted(kinds, reverse=True)
    assert set(kinds) == {PieceKind.THINKING, PieceKind.CONTENT}
    assert said(prompt, think=True) == said(prompt)


def test_thinking_is_continued_and_left_out_behind_content() -> None:
    messages = [Message("user", "hi")]
    full = compose(ask(of_messages(messages), think=True), BOUNDS).joined(PieceKind.THINKING)
    cut = of_messages([*messages, Message("assistant", thinking=full[:5])])
    assert compose(ask(cut, think=True), BOUNDS).joined(PieceKind.THINKING) == full[5:]
    begun = of_messages([*messages, Message("assistant", said(of_messages(messages))[:2])])
    assert compose(ask(begun, think=True), BOUNDS).joined(PieceKind.THINKING) == ""


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "share": {"type": "number"},
        "exact": {"type": "boolean"},
        "nothing": {"type": "null"},
        "unit": {"type": "string", "enum": ["metric", "imperial"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "inner": {"type": "object"},
    },
}


def test_answer_fits_its_schema() -> None:
    value = json.loads(said(of_messages([Message("user", "hi")]), schema=SCHEMA))
    types = {name: type(one) for name, one in value.items()}
    assert types == {
        "city": str,
        "days": int,
        "share": float,
        "exact": bool,
        "nothing": type(None),
        "unit": str,
        "tags": list,
        "inner": dict,
    }
    assert value["unit"] == "metric"


def test_tool_is_called_when_the_user_asks_for_it() -> None:
    prompt = of_messages([Message("user", "please use the tool weather now")])
    answer = compose(ask(prompt, tools={"weather": SCHEMA, "other": {}}), BOUNDS)
    assert [call.name for call in answer.calls] == ["weather"]
    assert answer.joined(PieceKind.CONTENT) == ""


def test_tool_result_is_answered_in_words() -> None:
    messages = [
        Message("user", "use the tool weather"),
        Message("assistant", calls="[]x"),
        Message("tool", "rain"),
    ]
    answer = compose(ask(of_messages(messages), tools={"weather": SCHEMA}), BOUNDS)
    assert answer.calls == []
    assert answer.joined(PieceKind.CONTENT)


def test_next_turn_begins_with_the_blocks_of_the_last() -> None:
    turn = [Message("user", "tell me a story " * 20)]
    prompt = of_messages(turn)
    answer = said(prompt)
    following = [*turn, Message("assistant", answer), Message("user", "go on, please, do " * 9)]
    kept = prompt.blocks(4, answer)
    assert len(kept) > len(prompt.blocks(4)) > 3
    assert of_messages(following).blocks(4)[: len(kept)] == kept


def test_images_and_context_count_as_tokens() -> None:
    plain = of_messages([Message("user", "hi")])
    image = of_messages([Message("user", "hi", images=("aGk=",))], context=[1, 2, 3])
    assert image.tokens > plain.tokens + 256
    assert image.text != plain.text


@given(st.text(max_size=50))
def test_vector_has_length_one(content: str) -> None:
    vector = text.vector("m", content, 16)
    assert len(vector) == 16
    assert math.isclose(math.hypot(*vector), 1, abs_tol=1e-5)
