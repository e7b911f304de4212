"""Reads YAML into plain values that know where they stand, with `${NAME}` filled in.

Every mistake is collected in the `Document`. No text of this module, and none made with `found`,
holds a value that came from the environment.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml
from pydantic_core import ErrorDetails

MAX_BYTES = 1 << 18  # PyYAML reads this in 3 s at worst
_MAX_DEPTH = 20
_MAX_VALUES = 20_000

Path = tuple[str | int, ...]

_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULLS = ("", "~", "null")
# Narrower than YAML 1.1, which reads 1:30 as 90 and 010 as 8. The length keeps int() cheap.
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]{0,39})(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][-+]?[0-9]{1,4})?"
)
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
_VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)\})?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PLAIN_KEY = re.compile(r"[\w.:/@+*-]{1,60}")
# A URL refused for its password or its query must not show it while it is refused.
_TELLING = re.compile(r"[@?]")

_SYNTAX = (
    ("found character '\\t'", "a tab stands here: indent with spaces"),
    ("found character", "no value starts with this character: put the value in quotes"),
    ("mapping values are not", "no ': ' is expected here: check the indentation or use quotes"),
    ("expected alphabetic", "a value that starts with * or & must stand in quotes"),
    ("expected ',' or", "a comma or a bracket is missing (quote what starts with ! or holds ${)"),
    ("expected <block end>", "the indentation does not fit the lines above"),
    ("expected the node content", "a value is missing here, or a bracket is not closed"),
    ("found unexpected end", "this quote is not closed"),
    ("could not find expected ':'", "a ': ' is missing behind this key"),
    ("but found another", "a second document starts here (---): only one is read"),
    ("found undefined alias", "this *alias has no &anchor above it (or is a value without quotes)"),
    ("second occurrence", "this &anchor stands twice"),
    ("too deep", f"nested more than {_MAX_DEPTH} levels deep"),
)
_WORDS = {
    "extra_forbidden": "unknown key",
    "missing": "missing: it has no default",
    "string_type": "a text is expected (numbers, on and off in quotes)",
    "int_type": "a whole number is expected",
    "float_type": "a number is expected",
    "bool_type": "true or false is expected",
    "model_type": "a mapping (key: value) is expected",
    "dict_type": "a mapping (key: value) is expected",
    "tuple_type": "a list is expected",
    "too_short": "a list of at least one is expected",
    "finite_number": "a finite number is expected",
    "literal_error": "accepted: {expected}",
    "enum": "accepted: {expected}",
    "greater_than": "more than {gt:.15g} is expected",
    "greater_than_equal": "at least {ge:.15g} is expected",
    "less_than": "less than {lt:.15g} is expected",
    "less_than_equal": "at most {le:.15g} is expected",
}
_AT_ITS_START = ("found unexpected end", "could not find expected ':'")


class Filled(str):
    """A text that holds at least one value of the environment, and so is never shown."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands, counted from 1. `shown`: how a mistake may quote it, if at all."""

    line: int = 1
    column: int = 1
    shown: str = ""


@dataclass(slots=True)
class Document:
    """What a file says. `value` is None where it cannot be read at all.

    Lists are tuples; mappings keep the first of two equal keys. `broken` are the paths of
    values whose mistake is already known: whatever else is wrong with them follows from it.
    """

    name: str
    value: dict[str, object] | None = None
    values: dict[Path, Place] = field(default_factory=dict)
    keys: dict[Path, Place] = field(default_factory=dict)
    broken: set[Path] = field(default_factory=set)
    mistakes: list[tuple[Place, str]] = field(default_factory=list)

    def refuse(self, path: Path, text: str) -> None:
        """Note a mistake at the value; for a value that is not there, at what should hold it."""
        near = self.nearest(path)
        self.refuse_at(self.values.get(near, Place()), near, text)

    def refuse_key(self, path: Path, text: str) -> None:
        """Note a mistake at the key, or at the value where there is none (list items, the top)."""
        near = self.nearest(path)
        self.refuse_at(self.keys.get(near) or self.values.get(near, Place()), path, text)

    def refuse_at(self, place: Place, path: Path, text: str) -> None:
        where = spelled(path)
        self.mistakes.append((place, f"{where}: {text}" if where else text))

    def nearest(self, path: Path) -> Path:
        """The longest part of the path that the file spells out."""
        while path and path not in self.values:
            path = path[:-1]
        return path

    def known_broken(self, path: Path) -> bool:
        return any(path[:end] in self.broken for end in range(len(path) + 1))

    def found(self, path: Path) -> str:
        """`, found 'x'` for a scalar that may be shown, else nothing."""
        place = self.values.get(path)
        return f", found {place.shown}" if place and place.shown else ""

    def report(self) -> list[str]:
        """All mistakes in the order of the file."""
        ordered = sorted(self.mistakes, key=lambda mistake: (mistake[0].line, mistake[0].column))
        return [f"{self.name}:{at.line}:{at.column}: {text}" for at, text in ordered]


def spelled(path: Path) -> str:
    """`nodes[1].labels.gpu`. A key that is no plain word may be a misplaced secret: `?`."""
    parts = [
        f"[{part}]" if isinstance(part, int) else f".{part if _PLAIN_KEY.fullmatch(part) else '?'}"
        for part in path
    ]
    return "".join(parts).removeprefix(".")


def typed(value: object) -> object:
    """Read what the environment filled in as the number or boolean that it spells."""
    return _scalar(value.strip()) if isinstance(value, Filled) else value


def _scalar(text: str) -> object:
    """Read a plain scalar, which is not null."""
    if text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    special = _SPECIAL.get(text.lower())
    return text if special is None else float(special)


def read(text: bytes, name: str, env: Mapping[str, str]) -> Document:
    """Read a whole file. `name` is how mistakes call it, `env` what `${NAME}` is filled from."""
    document = Document(name)
    loader = _loader(text, document)
    root = _root(loader, document) if loader else None
    if loader is None or document.mistakes:
        return document
    if root is None or (isinstance(root, yaml.ScalarNode) and not root.value):
        what = "holds only comments" if text.strip() else "is empty"
        document.refuse((), f"the file {what}; the least is: nodes: [http://127.0.0.1:11434]")
    elif isinstance(root, yaml.MappingNode):
        _Walk(document, env, loader.tagged).start(root)
    else:
        document.refuse((), "settings (key: value) are expected at the top of the file")
    return document


def worded(error: ErrorDetails) -> str:
    """One of pydantic's mistakes in our words, without what was found."""
    known = _WORDS.get(error["type"])
    if known is None:  # a check of our own
        return error["msg"].removeprefix("Value error, ")
    return known.format(**error.get("ctx", {}))


class _Loader(yaml.SafeLoader):
    """Composes nodes, not too deep, and remembers where a tag stands."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.tagged: set[int] = set()

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        assert isinstance(mark, yaml.Mark)
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
            self.tagged.add(mark.index)
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, "too deep", mark)
        node = super().compose_node(parent, index)  # type: ignore[arg-type]
        self.depth -= 1
        return node


def _loader(text: bytes, document: Document) -> _Loader | None:
    if len(text) > MAX_BYTES:
        document.refuse((), f"the file is larger than {MAX_BYTES} bytes")
        return None
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = text[: error.start]
        place = _place_in(before.decode(errors="replace"))
        document.refuse_at(place, (), "the file is not UTF-8: save it as UTF-8")
        return None
    try:
        return _Loader(decoded)
    except yaml.reader.ReaderError as error:
        text_before = decoded[: error.position]
        document.refuse_at(_place_in(text_before), (), "a control character stands here")
        return None


def _place_in(before: str) -> Place:
    return Place(before.count("\n") + 1, len(before) - before.rfind("\n"))


def _root(loader: _Loader, document: Document) -> yaml.Node | None:
    try:
        root: yaml.Node | None = loader.get_single_node()
        return root
    except yaml.MarkedYAMLError as error:
        place, advice = _syntax(error)
        document.refuse_at(place, (), advice)
    except (ValueError, OverflowError):  # PyYAML's own int() and chr(), on what the file says
        mark = loader.get_mark()
        document.refuse_at(_place(mark), (), "YAML does not allow this number or escape")
    return None


def _syntax(error: yaml.MarkedYAMLError) -> tuple[Place, str]:
    """PyYAML's words can quote the file, so none of them are passed on."""
    problem = error.problem or ""
    advice = "this is not YAML: check indentation, quotes and brackets"
    for start, text in _SYNTAX:
        if problem.startswith(start):
            advice = text
            break
    unclosed = problem.startswith(_AT_ITS_START) or "<stream end>" in problem
    mark = (error.context_mark if unclosed else None) or error.problem_mark or error.context_mark
    return (_place(mark) if mark else Place()), advice


def _place(mark: yaml.Mark, shown: str = "") -> Place:
    return Place(mark.line + 1, mark.column + 1, shown)


class _TooMany(Exception):
    """Aliases of aliases have grown the file beyond all use."""


class _Walk:
    """Turns composed nodes into values, once over the whole tree."""

    def __init__(self, document: Document, env: Mapping[str, str], tagged: set[int]) -> None:
        self.document = document
        self.env = env
        self.tagged = tagged
        self.count = 0

    def start(self, root: yaml.MappingNode) -> None:
        self.document.values[()] = _place(root.start_mark)
        try:
            self.document.value = self._mapping(root, ())
        except _TooMany:
            self.document.mistakes.clear()
            self.document.refuse((), f"the file spells out more than {_MAX_VALUES} values")

    def _value(self, node: yaml.Node, path: Path) -> object:
        self.count += 1
        if self.count > _MAX_VALUES:
            raise _TooMany
        self.document.values[path] = _place(node.start_mark)
        if len(path) > _MAX_DEPTH:  # an anchor that holds its own alias
            return self._broken(path, f"nested more than {_MAX_DEPTH} levels deep")
        if node.start_mark.index in self.tagged:
            return self._broken(path, "a value that starts with ! must stand in quotes")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return tuple(self._value(item, (*path, n)) for n, item in enumerate(node.value))
        assert isinstance(node, yaml.ScalarNode)  # there is no fourth kind
        return self._text(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        entries: dict[str, object] = {}
        refuse_at = self.document.refuse_at
        for key_node, value_node in node.value:
            place = _place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                refuse_at(place, path, "a key must be a plain word")
                continue
            key = key_node.value
            here = (*path, key)
            if _SURROGATE.search(key):
                refuse_at(place, path, "this key holds half a character (\\ud800 to \\udfff)")
            elif key == "<<" and key_node.style is None:
                refuse_at(place, path, "merge keys (<<) are not supported: write the keys out")
            elif key in entries:
                first = self.document.keys[here].line
                refuse_at(place, here, f"this key stands twice, first in line {first}: keep one")
            else:
                self.document.keys[here] = place
                entries[key] = self._value(value_node, here)
        return entries

    def _text(self, node: yaml.ScalarNode, path: Path) -> object:
        text: str = node.value
        plain = node.style is None
        if _SURROGATE.search(text):
            return self._broken(path, "holds half a character (\\ud800 to \\udfff)")
        if plain and text.lower() in _NULLS:
            return self._broken(path, "is empty: give a value or remove it")
        if "${" in text:
            return self._filled(text, path)
        value = _scalar(text) if plain else text
        self.document.values[path] = _place(node.start_mark, _shown(text, value))
        return value

    def _filled(self, text: str, path: Path) -> object:
        names = [match[1] for match in _VARIABLE.finditer(text) if match[0] != "$${"]
        for name in dict.fromkeys(names):
            if name is None:
                self._broken(path, "a ${ must read ${NAME}; for the text itself write $${")
            elif name not in self.env:
                self._broken(path, f"the environment has no variable {name}")
        if path in self.document.broken:
            return None
        whole = _VARIABLE.sub(lambda match: self.env[match[1]] if match[1] else "${", text)
        if _SURROGATE.search(whole):
            return self._broken(path, "a variable holds bytes that are not UTF-8")
        return Filled(whole) if names else whole

    def _broken(self, path: Path, text: str) -> object:
        self.document.broken.add(path)
        self.document.refuse(path, text)
        return None


def _shown(text: str, value: object) -> str:
    short = text if len(text) <= 40 else text[:40] + "..."
    if isinstance(value, str):
        return "" if _TELLING.search(text) else repr(short)
    if isinstance(value, bool) and text.lower() not in ("true", "false"):
        return f"{short}, which YAML reads as {str(value).lower()}"
    return short
