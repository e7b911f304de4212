"""What requests hold in memory: one sum, one limit, the oldest text first."""

from hypothesis import given
from hypothesis import strategies as st

from router.keep import Keep, Kept

LIMIT = 100


def add(kept: Kept, data: bytes) -> None:
    kept.take(data)
    kept.weigh()


def texts(keep: Keep, *sizes: int) -> list[Kept]:
    kept = [keep.keep() for _ in sizes]
    for one, size in zip(kept, sizes, strict=True):
        add(one, b"x" * size)
    return kept


def test_what_was_added_is_there_in_its_order() -> None:
    keep = Keep(LIMIT)
    one, other = keep.keep(), keep.keep()
    for piece in (b"a", b"bc", b""):
        add(one, piece)
        add(other, piece.upper())
    assert (one.data, other.data, keep.bytes) == (b"abc", b"ABC", 6)


def test_bodies_and_texts_are_one_sum() -> None:
    keep = Keep(LIMIT)
    keep.hold(30)
    (kept,) = texts(keep, 20)
    assert keep.bytes == 50
    kept.close()
    assert keep.bytes == 30
    keep.release(30)
    assert keep.bytes == 0


def test_over_the_limit_the_oldest_texts_are_given_up() -> None:
    keep = Keep(LIMIT)
    oldest, older, newest = texts(keep, 40, 30, 30)
    assert [one.lost for one in (oldest, older, newest)] == [False] * 3, "at the limit is not over"
    add(newest, b"y")
    assert [one.lost for one in (oldest, older, newest)] == [True, False, False]
    assert (oldest.data, len(newest.data), keep.bytes) == (b"", 31, 61)


def test_a_body_takes_the_room_of_texts() -> None:
    keep = Keep(LIMIT)
    oldest, newest = texts(keep, 50, 50)
    keep.hold(LIMIT)
    assert (oldest.lost, newest.lost, keep.bytes, keep.full) == (True, True, LIMIT, False)


def test_it_is_full_when_no_text_is_left_to_give_up() -> None:
    keep = Keep(LIMIT)
    keep.hold(LIMIT + 1)
    assert keep.full
    keep.release(1)
    assert not keep.full


def test_a_text_above_the_limit_gives_itself_up() -> None:
    keep = Keep(LIMIT)
    (kept,) = texts(keep, LIMIT + 1)
    assert (kept.lost, kept.data, keep.bytes) == (True, b"", 0)


def test_what_is_given_up_takes_nothing_more() -> None:
    keep = Keep(LIMIT)
    kept = keep.keep()
    add(kept, b"x")
    kept.give_up()
    add(kept, b"y")
    kept.give_up()
    kept.close()
    assert (kept.lost, kept.data, keep.bytes) == (True, b"", 0)


def test_a_closed_text_is_not_lost_and_may_be_closed_again() -> None:
    keep = Keep(LIMIT)
    (kept,) = texts(keep, 10)
    for _ in range(2):
        kept.close()
    add(kept, b"x")
    kept.give_up()
    assert (kept.lost, kept.data, keep.bytes) == (False, b"", 0)


def test_a_new_limit_holds_at_once() -> None:
    keep = Keep(LIMIT)
    oldest, newest = texts(keep, 50, 40)
    keep.reconfigure(45)
    assert (oldest.lost, newest.lost, keep.bytes) == (True, False, 40)
    keep.reconfigure(2 * LIMIT)
    add(newest, b"x" * LIMIT)
    assert not newest.lost


ACTS = st.lists(
    st.tuples(st.sampled_from(["keep", "add", "close", "hold", "release"]), st.integers(0, 60)),
    max_size=60,
)


@given(ACTS)
def test_the_sum_is_what_is_held_and_within_the_limit_unless_full(
    acts: list[tuple[str, int]],
) -> None:
    keep, kept, bodies = Keep(LIMIT), list[Kept](), list[int]()
    for act, number in acts:
        if act == "keep":
            kept.append(keep.keep())
        elif act == "hold":
            keep.hold(number)
            bodies.append(number)
        elif act == "release" and bodies:
            keep.release(bodies.pop())
        elif kept:
            one = kept[number % len(kept)]
            add(one, b"x" * number) if act == "add" else one.close()
        assert keep.bytes == sum(bodies) + sum(len(one.data) for one in kept)
        assert keep.full == (sum(bodies) > LIMIT)
        assert keep.bytes <= LIMIT or keep.full
    for one in kept:
        one.close()
    assert keep.bytes == sum(bodies)
