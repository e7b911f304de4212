"""Which beginnings of prompts a model is thought to have in its cache."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.prefix import BLOCK_BYTES, Prefixes, blocks

_KIB_256 = 256 * 1024
_MOST = 4096
TEXT = b"".join(b"%08d" % i for i in range(_KIB_256 // 4))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, 0),
        (1, 0),
        (BLOCK_BYTES - 1, 0),
        (BLOCK_BYTES, 1),
        (2 * BLOCK_BYTES - 1, 1),
        (5 * BLOCK_BYTES, 5),
        (_KIB_256, 128),
        (2 * _KIB_256, 128),
    ],
)
def test_only_whole_blocks_count_and_no_more_than_256_kib(size: int, expected: int) -> None:
    assert len(blocks(TEXT[:size])) == expected


@given(st.integers(0, 9 * BLOCK_BYTES), st.integers(0, 9 * BLOCK_BYTES))
def test_prompts_have_the_blocks_in_common_before_the_first_byte_that_differs(
    size: int, differs: int
) -> None:
    text = TEXT[: 9 * BLOCK_BYTES]
    other = text[:differs] + b"#" + text[differs + 1 :]
    known = Prefixes()
    known.remember(blocks(text[:size]))
    assert known.common(blocks(other[: 9 * BLOCK_BYTES])) == min(size, differs) // BLOCK_BYTES


def test_a_block_is_the_same_only_after_the_same_beginning() -> None:
    first, second = TEXT[:BLOCK_BYTES], TEXT[BLOCK_BYTES : 2 * BLOCK_BYTES]
    assert not set(blocks(first + second)) & set(blocks(second + first))
    assert len(set(blocks(first * 4))) == 4


def test_it_does_not_matter_in_what_the_bytes_are_held() -> None:
    text = TEXT[: 3 * BLOCK_BYTES]
    assert blocks(bytearray(text)) == blocks(memoryview(text)) == blocks(text)


def test_nothing_is_known_before_it_was_sent() -> None:
    known = Prefixes()
    assert known.common([1, 2]) == 0
    known.remember([1, 2, 3])
    assert [known.common(wanted) for wanted in ([], [1], [1, 2, 9], [2, 3])] == [0, 1, 2, 2]


def test_the_oldest_prompt_loses_its_end_first() -> None:
    known = Prefixes()
    known.remember(range(_MOST))
    known.remember(range(10_000, 10_100))
    assert known.common(range(_MOST)) == _MOST - 100
    assert known.common(range(10_000, 10_100)) == 100


def test_what_is_sent_again_is_new_again() -> None:
    known = Prefixes()
    known.remember([1, 2, 3])
    known.remember(range(100, 100 + _MOST - 3))
    known.remember([1, 2, 3])
    known.remember([7, 8, 9])
    assert known.common([1, 2, 3]) == 3
    assert known.common(range(100, 100 + _MOST)) == _MOST - 6


TREE = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), max_size=30)


@given(TREE, st.integers(100, 1500))
def test_a_block_is_never_known_without_those_before_it(
    prompts: list[list[int]], many: int
) -> None:
    """Whatever was driven out, what is left is of use: and there is never more than the most."""
    known, sent = Prefixes(), []
    for turn, choices in enumerate(prompts):
        filler = [hash((-1, turn, place)) for place in range(many)]
        chain = [hash(tuple(choices[: end + 1])) for end in range(len(choices))]
        for prompt in (chain, filler):
            known.remember(prompt)
            assert known.common(prompt) == len(prompt)
        sent += [chain, filler]
    for prompt in sent:
        common = known.common(prompt)
        assert not any(known.common([block]) for block in prompt[common:])
    assert len(known) <= _MOST
