"""What operators are told of decisions: of one that is not made, and of the last that were."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import msgspec
from aiohttp import web
from multidict import MultiMapping

from router import downstream
from router.core import dialect, wording
from router.core.pool import Pool
from router.core.types import Policy, Refusal, Rejected, Weighed
from router.core.work import USUAL, FlowRule, Work
from router.dispatch import Decision
from router.errors import ClientError

_BODY_MAX_BYTES = 1 << 16
_STALL_S = 10.0
_ROUTE = next(route for route in dialect.ROUTES if route.path == "/api/chat")
_MISTAKES = (Refusal.BAD_NAME, Refusal.UNKNOWN_PIN, Refusal.AMBIGUOUS_PIN)
_MOST = 1_000_000_000
_Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=_MOST)]


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request that nobody has sent: its model's name as a client would write it."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    prompt_tokens: _Count = 0
    num_ctx: _Size | None = None
    max_tokens: _Size | None = None
    flow: Annotated[str, msgspec.Meta(max_length=200)] = ""


async def asked(request: web.BaseRequest) -> Asked:
    """Read it from a JSON body or from the query. Raises ClientError with what is wrong."""
    body = await downstream.body(request, _BODY_MAX_BYTES, _STALL_S)
    if body and request.query:
        raise ClientError(400, "say it in the body or in the query, not in both")
    try:
        if body:
            fields = msgspec.json.decode(body, type=dict[str, object])
            return msgspec.convert({name: _whole(one) for name, one in fields.items()}, Asked)
        return msgspec.convert(_single(request.query), Asked, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ClientError(400, str(error)) from error


def _whole(value: object) -> object:
    """To JSON 1.0 is an integer, too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _single(query: MultiMapping[str]) -> Mapping[str, str]:
    for name in query:
        if len(query.getall(name)) > 1:
            raise ClientError(400, f"{name} is given more than once")
    return dict(query)


def explain(
    pool: Pool, asked: Asked, now: float, rules: Mapping[str, FlowRule]
) -> Mapping[str, object]:
    """What would become of such a request now, and what each node would cost it, the best first;
    all times are in seconds. `rules`: those of flows. Raises ClientError for a name that can be no
    model's."""
    target = pool.registry.resolve(asked.model)
    refused = target if isinstance(target, Rejected) else pool.registry.eligible(target)
    if isinstance(refused, Rejected) and refused.refusal in _MISTAKES:
        raise ClientError(*wording.refusal(_ROUTE, asked.model, refused))
    model, weighed = asked.model, []
    if not isinstance(target, Rejected):
        assert target.model is not None  # a resolved name
        rule = rules.get(asked.flow, USUAL)
        work = Work(
            asked.flow, asked.prompt_tokens, (), asked.max_tokens, asked.num_ctx, rule.priority,
            weight=rule.weight, at_least=pool.at_least,
        )  # fmt: skip
        model, weighed = target.model.key, [*pool.explain(target, work, now)]
    waits = pool.registry.schedules_at(weighed[0].node.url) if weighed else pool.schedules
    policy = Policy.EXPECTED_DELAY if waits else Policy.LEAST_IN_FLIGHT
    reason = refused.refusal if isinstance(refused, Rejected) else Refusal.ALL_TRIED
    return {
        "model": model,
        "policy": policy.value,
        **_verdict(weighed, reason),
        "nodes": [_node(one) for one in weighed],
    }


def _verdict(weighed: Sequence[Weighed], refusal: Refusal) -> Mapping[str, object]:
    """What would come of it; `refusal` where no node may be waited for."""
    best = weighed[0] if weighed else None
    if best is not None and best.now:
        return {"verdict": "now", "node": best.node.name, "reason": best.reason, "wait_s": 0.0}
    if best is not None and any(one.later for one in weighed):
        return {
            "verdict": "waits",
            "node": None if best.barred else best.node.name,
            "reason": best.reason,
            "wait_s": None if best.barred else _rounded(best.wait_s),
        }
    return {"verdict": "refused", "node": None, "reason": refusal.value, "wait_s": None}


def _node(one: Weighed) -> Mapping[str, object]:
    return {
        "name": one.node.name,
        "total_s": _rounded(one.total_s),
        "wait_s": _rounded(one.wait_s),
        "load_s": _rounded(one.load_s),
        "answer_s": _rounded(one.answer_s),
        "barred": one.barred or None,
    }


def decisions(made: Iterable[Decision], now: float, wall: float) -> Mapping[str, object]:
    """The last decisions, the latest first; `now` and `wall` are of one moment."""
    return {"decisions": [_decision(one, wall - now) for one in reversed([*made])]}


def _decision(one: Decision, behind_s: float) -> Mapping[str, object]:
    return {
        "at": round(one.at + behind_s, 3),
        "request": one.request or None,
        "flow": one.flow or None,
        "model": one.model or None,
        "node": one.node,
        "reason": one.reason.value,
        "waited_s": round(one.waited_s, 3),
        "expected_s": _rounded(one.expected_s),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(max(0.0, seconds), 3)
