"""The pool accounts for every page, whatever is taken, shared and released."""

import random

import pytest

from argrpo.engine.page_pool import PagePool


def test_random_owners_never_share_by_accident_and_everything_comes_back() -> None:
    pool, rng = PagePool(40), random.Random(0)
    held: list[int] = []
    for _ in range(2000):
        what = rng.random()
        if what < 0.5 and pool.num_free:
            page = pool.take()
            assert page not in held
            held.append(page)
        elif what < 0.6 and held:
            held.append(pool.share(rng.choice(held)))
        elif held:
            pool.release(held.pop(rng.randrange(len(held))))
        pool.check(held)
        assert pool.num_free == 40 - len(set(held))
    for page in held:
        pool.release(page)
    pool.check([])
    assert pool.num_free == 40


def test_a_shared_page_is_freed_by_its_last_holder() -> None:
    pool = PagePool(2)
    page = pool.take()
    pool.share(page)
    pool.release(page)
    assert pool.num_free == 1
    pool.release(page)
    assert pool.num_free == 2


def test_an_empty_pool_says_so() -> None:
    pool = PagePool(1)
    pool.take()
    with pytest.raises(RuntimeError, match="pages: expected a free one of 1, got none"):
        pool.take()


def test_pages_that_nobody_claims_and_claims_without_a_page_are_found() -> None:
    pool = PagePool(3)
    page = pool.take()
    for claims in ([], [page, page], [(page + 1) % 3]):
        with pytest.raises(RuntimeError, match="pages: expected holders as the pool counts"):
            pool.check(claims)
    pool.check([page])


def test_a_page_is_not_released_twice() -> None:
    pool = PagePool(2)
    page = pool.take()
    pool.release(page)
    with pytest.raises(AssertionError, match="is not held"):
        pool.release(page)
    with pytest.raises(AssertionError, match="is not held"):
        pool.share(page)
