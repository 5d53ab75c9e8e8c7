"""The scheduler with a fake runner: no token lost or doubled, no page lost, fairness, sharing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.fake_runner import World, continuation, temperature
from qwen1m_ext.config import load_config
from qwen1m_ext.errors import MemoryBudgetError, RequestError
from qwen1m_ext.residency import Residency
from qwen1m_ext.scheduler import MIN_CHUNK_TOKENS, Limits
from qwen1m_ext.sequence import AttentionPolicy, Request, Sequence
from qwen1m_ext.sessions import Session


@pytest.fixture(scope="module")
def make(checkpoint: Path):
    config = load_config(checkpoint)

    def world(pages: int = 16, delay: int = 1, **limits: object) -> World:
        limits = {"chunk_tokens": 256, "max_num_seqs": 8, **limits}
        return World(config, Limits(**limits), pages, delay)  # type: ignore[arg-type]

    return world


def text(length: int, family: int = 0) -> list[int]:
    return [(7 * i + family) % 97 for i in range(length)]


def check_outputs(world: World, request: Request) -> None:
    for sample in request.samples:
        want = continuation(request.prompt, sample.index, sample.max_tokens)
        assert world.outputs[sample] == want


def check_pages(world: World, held: int = 0) -> None:
    """Everything is given back, and nothing twice."""
    allocator = world.cache.allocator
    assert allocator.num_free == allocator.num_pages - held
    assert sum(allocator.users(page) > 0 for page in range(allocator.num_pages)) == held
    assert not world.residency.running and not world.residency.waiting


request_plans = st.lists(
    st.tuples(
        st.integers(0, 12),  # steps before it is submitted
        st.integers(1, 700),  # prompt tokens
        st.integers(0, 2),  # family: which beginning
        st.integers(1, 160),  # max_tokens
        st.sampled_from([1, 1, 1, 3]),  # n
        st.integers(0, 1),  # priority
        st.one_of(st.none(), st.integers(0, 8)),  # steps until it is cancelled
        st.booleans(),  # through the session
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(
    plans=request_plans,
    pages=st.integers(8, 24),
    chunk=st.integers(1, 300),
    delay=st.integers(0, 3),
    seqs=st.integers(1, 4),
    frozen=st.booleans(),
)
def test_no_token_and_no_page_is_lost(make, plans, pages, chunk, delay, seqs, frozen) -> None:
    """Whatever arrives, is cancelled, preempted or evicted: every output is the one it must be.

    The fake runner also reads back every sequence through its block table before each token.
    """
    world = make(pages, delay, chunk_tokens=chunk, max_num_seqs=seqs)
    session = Session(world.cache, freeze_temperature=frozen)
    requests = []
    for wait, length, family, max_tokens, n, priority, cancel_after, in_session in plans:
        for _ in range(wait):
            world.step()
        length = min(length, pages * 128 - max_tokens)
        request = world.submit(
            text(length, family), max_tokens, n, priority, session if in_session else None
        )
        requests.append((request, cancel_after))
        if cancel_after is not None:
            for _ in range(cancel_after):
                world.step()
            world.cancel(request)
    world.run()
    session.close()
    check_pages(world)
    for request, cancel_after in requests:
        assert all(sample.released for sample in request.samples)
        if request.error is not None:
            assert isinstance(request.error, MemoryBudgetError) and session.token_ids is not None
        elif cancel_after is None:
            check_outputs(world, request)
        else:
            for sample in request.samples:
                want = continuation(request.prompt, sample.index, sample.max_tokens)
                got = world.outputs[sample]
                assert got == want[: len(got)]


def test_too_little_memory_preempts_and_loses_nothing(make) -> None:
    """Three requests of 5 pages each at their end, in 8 pages."""
    world = make(pages=8)
    requests = [world.submit(text(200, f), max_tokens=400) for f in range(3)]
    world.run()
    assert world.residency.preemptions > 0
    for request in requests:
        check_outputs(world, request)
    check_pages(world)


def test_a_stop_learnt_late_is_undone(make) -> None:
    """However late the output processor is, the same tokens come out and nothing stays behind."""
    discarded = []
    for delay in (0, 4):
        world = make(delay=delay)
        requests = [world.submit(text(20, f), max_tokens=301) for f in range(8)]
        world.run()
        for request in requests:
            check_outputs(world, request)
        assert any(len(world.outputs[r.samples[0]]) < 301 for r in requests)  # some met EOS
        check_pages(world)
        discarded.append(world.residency.discarded)
    assert 0 < discarded[0] < discarded[1]


def test_equal_beginnings_are_computed_once(make) -> None:
    world = make()
    first = world.submit(text(290), max_tokens=2)
    world.run()
    second = world.submit([*text(256), 1, 2, 3], max_tokens=2)
    world.run()
    assert first.cached == 0 and second.cached == 256
    check_outputs(world, second)


def test_beyond_the_trained_length_only_the_same_prompt_hits(make) -> None:
    world = make()
    for prompt, cached in ((text(600), 0), (text(500), 0), (text(600), 512), (text(601), 0)):
        request = world.submit(prompt, max_tokens=2)
        world.run()
        assert request.cached == cached and temperature(len(prompt)) > 1
        check_outputs(world, request)


def test_output_is_shared_up_to_the_trained_length_only(make) -> None:
    """The tokens of an output beyond it were computed under other temperatures."""
    world = make()
    first = world.submit(text(120, 1), max_tokens=330)
    world.run()
    answer = world.outputs[first.samples[0]]
    whole = first.prompt + answer
    second = world.submit(whole[:280], max_tokens=2)
    world.run()
    assert second.cached == 256
    third = world.submit(whole[:420], max_tokens=2)
    world.run()
    assert third.cached == 0


def test_a_frozen_session_takes_no_output_of_other_temperatures(make) -> None:
    """Another request's output has the same text, but s went up while it was generated."""
    world = make()
    prompt = text(400, 1)
    first = world.submit(prompt, max_tokens=200)
    session = Session(world.cache, freeze_temperature=True)
    world.submit(prompt, max_tokens=2, session=session)
    world.run()
    whole = [*prompt, *world.outputs[first.samples[0]][:140]]
    turn = world.submit(whole, max_tokens=2, session=session)
    world.run()
    assert turn.cached == 401
    check_outputs(world, turn)
    session.close()


def test_a_cancelled_prefill_is_resumed_at_its_last_chunk(make) -> None:
    world = make(pages=64, chunk_tokens=256)
    request = world.submit(text(4000))
    for _ in range(6):
        world.step()
    world.cancel(request)
    world.run()
    done = world.computed
    assert 1000 < done < 4000
    retry = world.submit(text(4000))
    world.run()
    assert retry.cached == done
    check_outputs(world, retry)


def test_samples_share_their_prompt(make) -> None:
    """The prompt is computed once; each other sample runs its last token again."""
    world = make()
    request = world.submit(text(500), max_tokens=1, n=4)
    world.run()
    assert world.computed in (503, 500 + 3 * 116)  # the leader may be gone by then
    check_outputs(world, request)
    world = make()
    request = world.submit(text(290, 2), max_tokens=40, n=4)
    world.run()
    check_outputs(world, request)
    check_pages(world)


def test_a_session_that_changes_its_mind_does_not_write_into_shared_pages(make) -> None:
    """Its second prompt leaves the first one in the middle of a page that others know or use."""
    other = [*text(150), *text(130, 50)]
    for other_runs in (False, True):
        world = make()
        session = Session(world.cache)
        world.submit(text(280), max_tokens=2, session=session)
        world.run()
        user = world.submit(text(290), max_tokens=200)
        while not (user.prefilled and other_runs) and world.step():
            pass
        assert user.cached == 256
        turn = world.submit(other, max_tokens=2, session=session)
        world.run()
        assert turn.cached == 150
        late = world.submit(text(290), max_tokens=2)
        world.run()
        for request in (user, turn, late):
            check_outputs(world, request)
        session.close()
        check_pages(world)


def test_the_oldest_pages_are_evicted_first_and_pins_stay(make) -> None:
    world = make(pages=8)
    pinned = world.submit(text(256, 1), max_tokens=1, pin=True)
    world.run()
    for family in (2, 3, 4):
        world.submit(text(256, family), max_tokens=1)
        world.run()
    assert world.cache.allocator.evictions == 0
    world.submit(text(290, 5), max_tokens=1)
    world.run()
    assert world.cache.allocator.evictions > 0
    cached = []
    for family in (1, 4, 2):
        request = world.submit([*text(256, family), 9], max_tokens=1)
        world.run()
        cached.append(request.cached)
    assert cached == [256, 256, 0]
    with pytest.raises(RequestError, match="pin: expected at most 4 pinned pages .* got 3 beside"):
        world.prefixes.check_pin(3)
    assert world.prefixes.unpin(pinned.request_id) and not world.prefixes.unpin("r1")
    check_pages(world)


def test_a_request_that_open_sessions_leave_no_room_for_is_refused(make) -> None:
    world = make(pages=4)
    session = Session(world.cache)
    world.submit(text(280), max_tokens=2, session=session)
    world.run()
    request = world.submit(text(200, 1), max_tokens=200)
    world.run()
    assert isinstance(request.error, MemoryBudgetError)
    assert "open sessions" in str(request.error)
    session.close()
    request = world.submit(text(200, 1), max_tokens=200)
    world.run()
    check_outputs(world, request)


def test_short_prompts_pass_a_long_one(make) -> None:
    """Half of each step belongs to them; the long one gets the other half."""
    world = make(pages=200, chunk_tokens=1024)
    long = world.submit(text(20_000), max_tokens=1)
    for _ in range(3):
        world.step()
    before = long.leader.computed
    shorts = [world.submit(text(400, f), max_tokens=3) for f in range(4)]
    for _ in range(8):
        world.step()
    assert all(sample.released for request in shorts for sample in request.samples)
    assert long.leader.computed - before >= 8 * 512 and not long.prefilled
    world.run()
    check_outputs(world, long)


def test_a_stream_of_short_prompts_does_not_starve_a_long_one(make) -> None:
    world = make(pages=200, chunk_tokens=512)
    long = world.submit(text(10_000), max_tokens=1)
    steps = 0
    while not long.prefilled:
        world.submit(text(256, steps), max_tokens=1)
        world.submit([*text(256, steps), 5], max_tokens=1)
        world.step()
        steps += 1
        assert steps <= 10_000 // 256 + 4


def test_equal_prompts_are_served_in_order(make) -> None:
    """Two long prompts side by side would both be late."""
    world = make(pages=200, chunk_tokens=512)
    first, second = (world.submit(text(8000, f), max_tokens=1) for f in range(2))
    while not first.prefilled:
        world.step()
    assert second.leader.computed <= 512


def test_steps_keep_the_latency_cap(make) -> None:
    """With a decode running, a long prefill is cut so that no step is predicted to take longer."""
    world = make(pages=1200, chunk_tokens=8192, max_itl_ms=50.0, max_chunk_ms=400.0)
    decode = world.submit(text(100), max_tokens=120)
    for _ in range(3):
        world.step()
    world.submit(text(100_000, 1), max_tokens=1)
    chunks = []
    while not decode.samples[0].released:
        world.step()
        step = world.steps[-1]
        chunk = max((p.end - p.begin for p in step.pieces), default=0)
        predicted = world.cost.seconds(piece.work for piece in step.pieces)
        mixed = any(p.decode for p in step.pieces) and chunk > 1
        if mixed and chunk > MIN_CHUNK_TOKENS:
            chunks.append(chunk)
            assert predicted <= 0.050
    assert chunks and chunks == sorted(chunks, reverse=True)  # later tokens attend to more keys
    for _ in range(4):
        world.step()
    alone = world.steps[-1].pieces[0]
    assert alone.end - alone.begin > chunks[-1]


def test_priority_comes_before_age(make) -> None:
    world = make(pages=200, chunk_tokens=256)
    low = world.submit(text(4000), priority=1)
    world.step()
    high = world.submit(text(4000, 1), priority=0)
    while not high.prefilled:
        world.step()
    assert low.leader.computed <= 3 * 256


def test_sparse_chunks_end_on_the_grid(make) -> None:
    """At multiples of 256 and of 600, beside short dense prompts, whatever the load."""
    policy = AttentionPolicy("sparse", grid=256, border=600)
    world = make(pages=64, chunk_tokens=256)
    request = world.submit(text(2000), policy=policy)
    shorts = []
    for i in range(12):
        shorts.append(world.submit(text(150, i), max_tokens=2))
        world.step()
    world.run()
    stops = {*range(0, 2000, 256), *range(0, 2000, 600), 2000}
    ends = [p.end for s in world.steps for p in s.pieces if p.sequence is request.leader]
    assert set(e for e in ends if e <= 2000) <= stops
    for one in [request, *shorts]:
        check_outputs(world, one)
    retry = world.submit(text(2000), policy=policy)
    dense = world.submit(text(2000))
    world.run()
    assert retry.cached == 1792 and dense.cached == 0


def test_a_memory_hog_is_not_overtaken_for_ever(make) -> None:
    """A prompt that needs nearly all pages runs although small ones keep arriving."""
    world = make(pages=8, max_num_seqs=4)
    world.submit(text(200), max_tokens=50)
    world.step()
    hog = world.submit(text(900, 1), max_tokens=2)
    for i in range(400):
        world.submit(text(130, 2 + i % 7), max_tokens=3)
        world.step()
        if hog.prefilled:
            break
    assert hog.prefilled


def test_many_samples_cost_each_the_same(make, monkeypatch) -> None:
    """Those that wait are not all looked at again and again: work grows with n, not its square."""
    looks = 0
    may_start = Residency.may_start

    def counted(self: Residency, sequence: Sequence) -> bool:
        nonlocal looks
        looks += 1
        return may_start(self, sequence)

    monkeypatch.setattr(Residency, "may_start", counted)
    per_sample = []
    for n in (100, 800):
        world, looks = make(pages=32), 0
        request = world.submit(text(40), max_tokens=3, n=n)
        world.run()
        check_outputs(world, request)
        check_pages(world)
        per_sample.append(looks / n)
    assert per_sample[1] < 2 * per_sample[0] < 100
