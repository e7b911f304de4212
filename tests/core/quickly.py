"""What is found without a look at everything is what such a look finds."""

from msgspec import structs

from router.core.policy import Attempt
from router.core.pool import Pool
from router.core.queue import Flow, Waiting
from router.core.types import Rejected


def agrees(pool: Pool, attempt: Attempt, now: float) -> bool:
    """Whether a request that came now would have the best node, were it given one at once. True
    where it would not."""
    found, scores = pool.registry.eligible_now(attempt, now), pool._scheduler.scores
    model = attempt.target.model
    if isinstance(found, Rejected) or not found.nodes[0].schedules or model is None:
        return True
    one = Waiting(attempt, model.key, Flow("w"), now, 0.0, 0)
    size = scores.costs.size(attempt.work, one.key)
    quick = scores.at_once(one, size, found.nodes, now)
    if quick is None:
        return True
    scores.begin()
    best = scores.best(one, size, found.nodes, (), now)
    node, loaded, delay = quick
    return (
        best is not None
        and (node, loaded) == (best[0].node, best[0].loaded)
        and structs.astuple(delay) == structs.astuple(best[1])
    )
