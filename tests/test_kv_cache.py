"""Pages of the key/value cache: nothing leaks, and no shared page is ever written."""

import random

import pytest
import torch

from minitune.model.decoding.kv_cache import PAGE, PagePool, pages_for, places_of
from minitune.model.decoding.requests import Request
from minitune.model.decoding.schedule import Schedule


def random_requests(rng):
    prompts = [[rng.randrange(9)] * rng.choice([1, 5, 63, 64, 65, 130, 200]) for _ in range(5)]
    return [
        Request(rng.choice(prompts), rng.randint(1, 150), adapter=rng.randrange(2))
        for _ in range(rng.randint(1, 30))
    ]


def check_pages(schedule, pool, pages):
    """Check owners and free pages, and that pages which will be written have one owner."""
    owners = [0] * pages
    waiting = [group.pages for group in schedule._groups if group.pages is not None]
    assert len(waiting) <= 1
    for pages_of_one in [x.pages for x in schedule.active] + waiting:
        assert len(set(pages_of_one)) == len(pages_of_one) and 0 not in pages_of_one
        for page in pages_of_one:
            owners[page] += 1
    assert owners == [pool.owners(page) for page in range(pages)]
    assert pool.free == pages - 1 - sum(count > 0 for count in owners)
    for x in schedule.active:
        assert len(x.pages) == pages_for(x.request.tokens)
        written = x.pages[len(x.request.prompt) // PAGE :]
        assert all(pool.owners(page) == 1 for page in written)


@pytest.mark.parametrize("seed", range(40))
def test_every_request_is_admitted_once_and_all_pages_come_back(seed):
    rng = random.Random(seed)
    requests = random_requests(rng)
    pages = 1 + max(pages_for(r.tokens) for r in requests) + rng.choice([0, 1, 3, 30])
    pool, done, prefilled = PagePool(pages), [], 0
    schedule = Schedule(requests, pool, rng.choice([1, 2, 8]), logprobs=False)
    while True:
        before = len(schedule.active)
        admission = schedule.admit()
        assert schedule.active[before:] == admission.sequences
        prefilled += len(admission.prefills)
        for source, target in admission.copies:
            assert pool.owners(target) == 1 and source != target
        for group, of_prompt in admission.prefills:
            assert len(of_prompt) == pages_for(len(group.prompt))
        check_pages(schedule, pool, pages)
        if not schedule.active:
            break
        for _ in range(rng.randint(1, len(schedule.active))):
            slot = rng.randrange(len(schedule.active))
            done.append(schedule.active[slot].index)
            last = schedule.active[-1]
            assert schedule.end(slot) == len(schedule.active)
            assert slot == len(schedule.active) or schedule.active[slot] is last
            check_pages(schedule, pool, pages)
    assert sorted(done) == list(range(len(requests)))
    assert pool.free == pages - 1
    if pages > 200:
        assert prefilled == len({(tuple(r.prompt), r.adapter) for r in requests})


def test_answers_to_one_prompt_store_it_once():
    requests = [Request([7] * 130, 10)] * 20
    pool = PagePool(1 + 3 + 20)
    admission = Schedule(requests, pool, 64, logprobs=False).admit()
    assert len(admission.sequences) == 20  # 2 shared pages, and a last page for each answer
    assert len(admission.prefills) == 1 and len(admission.copies) == 19
    assert pool.free == 1


def test_misused_pages_are_internal_errors():
    pool = PagePool(4)
    with pytest.raises(AssertionError, match="4 pages wanted, 3 are free"):
        pool.allocate(4)
    (page,) = pool.allocate(1)
    pool.release([page])
    for misuse in (pool.release, pool.share):
        with pytest.raises(AssertionError, match="is free"):
            misuse([page])


def test_places_follow_the_pages():
    places = places_of([5, 2, 9], PAGE + 3)
    assert torch.equal(places[:PAGE], torch.arange(5 * PAGE, 6 * PAGE))
    assert places[PAGE:].tolist() == [2 * PAGE, 2 * PAGE + 1, 2 * PAGE + 2]
