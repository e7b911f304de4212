"""YAML becomes plain values that know where they stand, or mistakes that say where they are."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router import yamlfile

ENV = {"A": "alpha", "N": "4", "EMPTY": "", "BAD": "x\udcff", "SPACED": " 7 "}


def read(text: str | bytes) -> yamlfile.Document:
    return yamlfile.read(text if isinstance(text, bytes) else text.encode(), "r.yaml", ENV)


def value(text: str) -> object:
    document = read(f"a: {text}")
    assert document.report() == []
    assert document.value is not None
    return document.value["a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x", "x"),
        ("'5'", "5"),
        ("5", 5),
        ("-3", -3),
        ("010", "010"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("0x10", "0x10"),
        ("9" * 18, int("9" * 18)),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        (".INF", math.inf),
        ("1e999", math.inf),
        ("true", True),
        ("off", False),
        ("'off'", "off"),
        ("'~'", "~"),
        ("[1, [b]]", (1, ("b",))),
        ("{b: {c: d}}", {"b": {"c": "d"}}),
        ("{1: x, on: y}", {"1": "x", "on": "y"}),
        ("|\n  two\n  lines\n", "two\nlines\n"),
        ("[&x 1, *x]", (1, 1)),
        ("'='", "="),
    ],
)
def test_scalars_are_read_without_surprises(text: str, expected: object) -> None:
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


def test_a_nan_is_read() -> None:
    assert repr(value(".nan")) == "nan"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${A}", "alpha"),
        ("'${A}-${N}'", "alpha-4"),
        ("pre ${A}", "pre alpha"),
        ("'$${A} ${A}'", "${A} alpha"),
        ("'$${'", "${"),
        ("$A $ {A}", "$A $ {A}"),
        ("|\n  ${A}\n", "alpha\n"),
        ("'${EMPTY}'", ""),
    ],
)
def test_variables_are_filled_in(text: str, expected: str) -> None:
    assert value(text) == expected


def test_a_filled_value_is_a_text_until_a_number_is_asked_for() -> None:
    found = value("${N}")
    assert found == "4"
    assert isinstance(found, yamlfile.Filled)
    assert yamlfile.typed(found) == 4
    assert yamlfile.typed(value("${SPACED}")) == 7
    assert yamlfile.typed("4") == "4"
    assert not isinstance(value("'$${x}'"), yamlfile.Filled)


def test_keys_and_comments_are_never_filled_in() -> None:
    document = read("# ${NOPE}\n'${A}': x  # ${NOPE}\n")
    assert document.value == {"${A}": "x"}
    assert document.report() == []


def test_a_value_that_was_filled_in_is_never_shown() -> None:
    document = read("a: ${A}\nb: beta\nc: u@h\nd: on\ne: 5\nf: " + "x" * 50)
    shown = [document.found((key,)) for key in "abcdefg"]
    assert shown == [
        "",
        ", found 'beta'",
        "",
        ", found on, which YAML reads as true",
        ", found 5",
        f", found '{'x' * 40}...'",
        "",
    ]


LEAST = "the least is: nodes: [http://127.0.0.1:11434]"
TOP = "settings (key: value) are expected at the top of the file"
BANG = "a value that starts with ! must stand in quotes"
VARIABLE = "a ${ must read ${NAME}; for the text itself write $${"
HALF = "half a character (\\ud800 to \\udfff)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [f"1:1: the file is empty; {LEAST}"]),
        (" \n\n", [f"1:1: the file is empty; {LEAST}"]),
        ("# only\n# this\n", [f"1:1: the file holds only comments; {LEAST}"]),
        ("---\n", [f"1:1: the file holds only comments; {LEAST}"]),
        ("[a, b]", [f"1:1: {TOP}"]),
        ("word", [f"1:1: {TOP}"]),
        (b"a: b\nc: \xff", ["2:4: the file is not UTF-8: save it as UTF-8"]),
        ("a: b\nc: \x01", ["2:4: a control character stands here"]),
        ("a:\n\t- b", ["2:1: a tab stands here: indent with spaces"]),
        ("a: @b", ["1:4: no value starts with this character: put the value in quotes"]),
        ("a: b: c", ["1:5: no ': ' is expected here: check the indentation or use quotes"]),
        ("a: [*:70b]", ["1:6: a value that starts with * or & must stand in quotes"]),
        ("a: *x", ["1:4: this *alias has no &anchor above it (or is a value without quotes)"]),
        ("a: &x 1\nb: &x 2", ["2:4: this &anchor stands twice"]),
        (
            "a:\n  - b\n  - [c\nd: e\n",
            ["4:2: a comma or a bracket is missing (quote what starts with ! or holds ${)"],
        ),
        (
            "a: {b: ${A}}",
            ["1:9: a comma or a bracket is missing (quote what starts with ! or holds ${)"],
        ),
        ("a: [", ["1:5: a value is missing here, or a bracket is not closed"]),
        ("a:\n    b: 1\n  c: 2", ["3:3: the indentation does not fit the lines above"]),
        ("a: 'x\nb: c\n", ["1:4: this quote is not closed"]),
        ("a: b\nword\nc: d\n", ["2:1: a ': ' is missing behind this key"]),
        ('a: "\\q"', ["1:6: this is not YAML: check indentation, quotes and brackets"]),
        ('a: "\\UFFFFFFFF"', ["1:7: YAML does not allow this number or escape"]),
        (
            "%YAML 1." + "9" * 5000 + "\n---\na: b",
            ["1:9: YAML does not allow this number or escape"],
        ),
        ("a: b\n---\nc: d", ["2:1: a second document starts here (---): only one is read"]),
        ("a: " + "[" * 30, ["1:23: nested more than 20 levels deep"]),
        ("a: !x b\nc: [!y d]\n", [f"1:4: a: {BANG}", f"2:5: c[0]: {BANG}"]),
        ("a: !!str 5", [f"1:4: a: {BANG}"]),
        ("a: 1\nb: 2\na: 3\n", ["3:1: a: this key stands twice, first in line 1: keep one"]),
        ("a: {b: 1, 'b': 2}", ["1:11: a.b: this key stands twice, first in line 1: keep one"]),
        (
            "[a]: b\nc: {{d: e}: f}",
            ["1:1: a key must be a plain word", "2:5: c: a key must be a plain word"],
        ),
        ("a: {<<: {b: c}}", ["1:5: a: merge keys (<<) are not supported: write the keys out"]),
        (
            "a:\nb: ~\nc: [null]",
            [
                f"{at}: is empty: give a value or remove it"
                for at in ("1:3: a", "2:4: b", "3:5: c[0]")
            ],
        ),
        (
            "a: ${NOPE} ${A} ${NADA} ${NOPE}",
            [
                "1:4: a: the environment has no variable NOPE",
                "1:4: a: the environment has no variable NADA",
            ],
        ),
        (
            "a: '${A'\nb: '${A:-x}'\nc: '${}'",
            [f"{n}:4: {k}: {VARIABLE}" for n, k in ((1, "a"), (2, "b"), (3, "c"))],
        ),
        ("a: ${BAD}", ["1:4: a: a variable holds bytes that are not UTF-8"]),
        ('a: "\\ud800"\n"\\udc00": b', [f"1:4: a: holds {HALF}", f"2:1: this key holds {HALF}"]),
        ("'odd key': {'Bearer x': }", ["1:24: ?.?: is empty: give a value or remove it"]),
        ("x" * (yamlfile.MAX_BYTES + 1), ["1:1: the file is larger than 262144 bytes"]),
    ],
)
def test_a_mistake_says_where_it_is_and_what_to_do(text: str | bytes, expected: list[str]) -> None:
    assert read(text).report() == [f"r.yaml:{line}" for line in expected]


def test_mistakes_come_in_the_order_of_the_file() -> None:
    document = read("a: ${NOPE}\nb:\nb: 2\nc: !x y\n")
    assert [line.split(" ")[0] for line in document.report()] == [
        f"r.yaml:{at}:" for at in ("1:4", "2:3", "3:1", "4:4")
    ]


def test_a_byte_order_mark_is_no_mistake() -> None:
    document = read(b"\xef\xbb\xbfa: b")
    assert document.value == {"a": "b"}
    assert document.keys["a",].column == 1


def test_windows_line_ends_count_as_one_line() -> None:
    assert read("a: b\r\nc: ${NOPE}\r\n").report()[0].startswith("r.yaml:2:4:")


def test_aliases_of_aliases_cannot_grow_without_bound() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    document = read("\n".join(lines))
    assert document.value is None
    assert document.report() == ["r.yaml:1:1: the file spells out more than 20000 values"]


def test_an_anchor_that_holds_itself_is_refused() -> None:
    (mistake,) = read("a: &a [*a]").report()
    assert mistake.endswith("[0]: nested more than 20 levels deep")


def test_a_mistake_is_placed_at_the_nearest_thing_the_file_spells_out() -> None:
    document = read("a:\n  b: [c]\n")
    document.refuse(("a", "b", 0), "value")
    document.refuse(("a", "z"), "parent")
    document.refuse_key(("a", "b", 0), "item")
    document.refuse_key(("a", "z"), "missing")
    document.refuse_key(("z",), "top")
    assert document.report() == [
        "r.yaml:1:1: a.z: missing",
        "r.yaml:1:1: z: top",
        "r.yaml:2:3: a: parent",
        "r.yaml:2:7: a.b[0]: value",
        "r.yaml:2:7: a.b[0]: item",
    ]


CHARACTERS = st.sampled_from("a-[]{}'\"|>#?~1 \n\t\ufeff\u2028\x00é")
INDICATORS = st.sampled_from(
    ["b: ", "- ", "  ", ", ", ": ", "*a ", "&a ", "!x ", "? ", "<<: ", "on"]
)
REST = st.sampled_from(["%YAML ", "---\n", "...", "${A}", "${", "$${", "\\U", "\\x"])
WORDS = CHARACTERS | INDICATORS | REST


@given(
    st.one_of(
        st.binary(),
        st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.lists(WORDS, max_size=40).map(lambda words: "".join(words).encode()),
    )
)
def test_any_bytes_give_values_or_mistakes(text: bytes) -> None:
    document = yamlfile.read(text, "r.yaml", ENV)
    assert (document.value is None) <= bool(document.mistakes)
    "\n".join(document.report()).encode()
