"""What commands show of the admin listener's answers, as tables of at most 100 columns."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_WIDTH, _RESIDENT_WIDTH, _NAME_WIDTH = 100, 16, 40
_COLUMNS = ("NODE", "STATE", "IN FLIGHT", "SLOTS", "VERSION", "PRESENT", "URL", "RESIDENT")


def nodes(status: Mapping[str, Any]) -> str:
    """One row per node; below, why some of them get no requests, or none for some models."""
    nodes = status["nodes"]
    rows = [_COLUMNS[:-1], *(_row(node) for node in nodes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = max(_WIDTH - sum(widths) - 2 * len(widths), _RESIDENT_WIDTH)
    last = [_COLUMNS[-1], *(_fitting(node["resident"], left) for node in nodes)]
    lines = [
        "  ".join([*map(str.ljust, row, widths), resident])
        for row, resident in zip(rows, last, strict=True)
    ]
    return "\n".join(map(printable, [*lines, *_below(nodes)]))


def _below(nodes: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    notes = [f"{node['name']}: {note}" for node in nodes for note in _notes(node)]
    return ["", *_wrapped(notes)] if notes else []


def _wrapped(notes: Iterable[str]) -> Sequence[str]:
    return [
        line
        for note in notes
        for line in textwrap.wrap(note, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    ]


def _row(node: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        node["name"],
        ", ".join(_states(node)),
        str(node["in_flight"]),
        _slots(node),
        node["version"] or "-",
        str(len(node["present"])),
        node["url"],
    )


def _slots(node: Mapping[str, Any]) -> str:
    """The learned ones of its models in brackets."""
    learned = sorted({*node["slots_learned"].values()})
    if node["slots"] != "auto" or not learned:
        return str(node["slots"])
    return f"auto ({learned[0]}-{learned[-1]})" if len(learned) > 1 else f"auto ({learned[0]})"


def _states(node: Mapping[str, Any]) -> Sequence[str]:
    states = ["drained"] if node["draining"] else []
    whole = [one for one in node["ejected"] if one["model"] is None]
    states += ["on trial" if one["trial"] else "ejected" for one in whole]
    return states if states and node["state"] == "up" else [node["state"], *states]


def _fitting(names: Sequence[str], width: int) -> str:
    """As many as fit, the first one at least in part, and how many more there are."""
    for count in range(len(names), 0, -1):
        more = f" +{len(names) - count}" if count < len(names) else ""
        text = ", ".join(names[:count]) + more
        if len(text) <= width:
            return text
    return f"{names[0][: width - len(more) - 2]}..{more}" if names else "-"


def _notes(node: Mapping[str, Any]) -> Iterable[str]:
    if node["state"] != "up":
        yield f"{node['state']}: {node['detail']}"
    for one in node["ejected"]:
        subject = "" if one["model"] is None else f"{one['model']} "
        wait_s = one["next_trial_s"]
        when = f"in {wait_s:g} s" if wait_s else "with the next request"
        if one["busy"]:
            yield f"{subject}busy, asked again {when}"
        elif one["trial"]:
            yield f"{subject}on trial, was ejected: {one['reason']}"
        else:
            yield f"{subject}ejected: {one['reason']}; on trial {when}"


def printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


_EXPLAINED = ("NODE", "TOTAL", "WAIT", "LOAD", "ANSWER")
_TERMS = ("total_s", "wait_s", "load_s", "answer_s")


def explained(answer: Mapping[str, Any]) -> str:
    """What would become of a request; one row per node, and below why some may not have it."""
    seconds = [[_seconds(one[term]) for term in _TERMS] for one in answer["nodes"]]
    names = [_cut(one["name"]) for one in answer["nodes"]]
    rows = [_EXPLAINED, *([name, *row] for name, row in zip(names, seconds, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    notes = [f"{one['name']}: {one['barred']}" for one in answer["nodes"] if one["barred"]]
    below = ["", *_wrapped(notes)] if notes else []
    return "\n".join(map(printable, [*_wrapped([_verdict(answer)]), "", *lines, *below]))


def _verdict(answer: Mapping[str, Any]) -> str:
    model, reason = answer["model"], answer["reason"]
    match answer["verdict"]:
        case "now":
            text = f"{model} gets {answer['node']} now: {reason}"
        case "waits":
            node, wait_s = answer["node"], answer["wait_s"]
            text = f"{model} waits" + (f" for {node}" if node else "")
            text += "" if wait_s is None else f", about {_seconds(wait_s)} s"
        case _:
            text = f"{model} is refused: {reason}"
    return f"{text} ({answer['policy']})"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 2]}.."
