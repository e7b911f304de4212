"""How large requests are likely to be, and what models cost on nodes."""

from router.core.costs import Costs
from router.core.node import Node
from router.core.types import Model, Observation, Sign
from router.core.usage import Usage
from router.core.work import Work
from tests.core.build import spec

GB = 10**9


def made(*keys: str) -> Node:
    node = Node(spec("a"), "default", now=0.0)
    present = {key: Model(key, "", {"size": 7 * GB}) for key in keys}
    node.learn(Observation(Sign.GOOD, present=present))
    return node


def answered(costs: Costs, node: Node, key: str, tps: float) -> None:
    node.replicas.setdefault(key, node._replica(key, 0.0))
    told = Usage(0, 100, None, 100 / tps, None)
    node.replicas[key].rates.learn(told)
    costs.learn(node, key, "team", told)


def test_each_answer_tells_of_all_models_there() -> None:
    costs, node = Costs(), made("m", "other")
    assert costs.of(node, "other").decode_s == 1 / 50
    answered(costs, node, "m", 25)
    assert costs.of(node, "m").decode_s == 1 / 25
    assert costs.of(node, "other").decode_s == 1 / 25, "the node is half as fast as was guessed"
    assert costs.guessed(node, "other").decode_s == 1 / 50
    assert repr(costs) == "<Costs of [<a unknown 0 in flight>]>"


def test_a_size_is_guessed_anew_where_nodes_have_other_models() -> None:
    costs, node = Costs(), made("m")
    assert costs.guessed(node, "m").decode_s == 1 / 50
    node.learn(Observation(Sign.GOOD, present={"m": Model("m", "", {"size": 14 * GB})}))
    costs.forget()
    assert costs.guessed(node, "m").decode_s == 1 / 25


def test_a_prompt_longer_than_the_context_is_cut() -> None:
    costs = Costs()
    assert costs.size(Work(prompt_tokens=9000), "m") == (9000, False, 300)
    costs.see({"m": 4096})
    assert costs.size(Work(prompt_tokens=9000, max_tokens=10), "m") == (4096, True, 10)
    assert costs.size(Work(prompt_tokens=4096), "m") == (4096, False, 300)


def test_of_too_many_contexts_those_seen_longest_ago_are_forgotten() -> None:
    costs = Costs()
    for i in range(5000):
        costs.see({f"m{i}": 1, "kept": 2})
    assert costs.size(Work(prompt_tokens=9), "m0") == (9, False, 300)
    assert costs.size(Work(prompt_tokens=9), "m4999") == (1, True, 300)
    assert costs.size(Work(prompt_tokens=9), "kept") == (2, True, 300)
