"""What a trace needs, against a server written from the definitions alone, and brute force."""

import gc
import math

import numpy as np
import pytest

from kv_cache_manager import OutOfBlocksError
from sequence import Sequence, SequenceGroup
from vllm_sim.serving.latency import UNIT, LatencyModel
from vllm_sim.serving.scheduler import Limits
from vllm_sim.serving.simulator import Observer, simulate
from vllm_sim.serving.systems import POLICIES, new_manager
from vllm_sim.sizing import trace_needs, trace_serving
from vllm_sim.sizing.trace_needs import EXACT, servers_needed, smallest, smallest_pool
from vllm_sim.sizing.trace_serving import (
    Server,
    TraceTooLargeError,
    Watch,
    allowed,
    holds_up_none,
    serve,
    unbounded,
)

SIZE, MAX_LEN = 4, 40
LATENCY = LatencyModel(step_s=1.0, token_s=0.013, context_s=0.0007, request_s=0.11)
SERVER = Server(SIZE, MAX_LEN, LATENCY, Limits(60, 10**9))
TODAY = Server(SIZE, MAX_LEN, LATENCY, Limits(12, 12, chunked=True), watermark=0.0)
SERVERS = pytest.mark.parametrize("server", [SERVER, TODAY], ids=["whole", "in parts"])


def tiny(seed, count=16, gap=2.5):
    """A trace of a few requests that overlap."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(gap, count))
    prompts = rng.integers(1, 21, count)
    outputs = rng.integers(1, 20, count)
    return arrivals.tolist(), prompts.tolist(), outputs.tolist()


def naive_paged(columns, num_blocks):
    """(preemptions, {requests kept waiting}, {request: start}, {request: finish}) of paging.

    Iteration by iteration from section 4.5's rules, knowing no module of the project's but the
    constants of the latency model; None if a request would not fit the pool alone.
    """
    watermark = int(0.01 * num_blocks)
    lens = list(zip(*columns))
    if any(-(-(p + o - 1) // SIZE) > num_blocks for _, p, o in lens):
        return None
    arrived, waiting, running = 0, [], []
    done = [0] * len(lens)  # tokens generated
    held = {}  # request -> tokens in the cache
    blocks = {}
    now, short = 0.0, False
    preemptions, kept, start, finish = 0, set(), {}, {}

    def free():
        return num_blocks - sum(blocks.values())

    while len(finish) < len(lens):
        if not waiting and not running:
            now = max(now, lens[arrived][0])
        while arrived < len(lens) and lens[arrived][0] <= now:
            waiting.append(arrived)
            if short:
                kept.add(arrived)
            arrived += 1
        preempted = []
        turn = 0
        while turn < len(running):
            has_room = len(running) == 1 and held[running[0]] % SIZE > 0  # alone, that is enough
            if free() < 1 and not has_room:
                victim = running.pop()
                del held[victim], blocks[victim]
                preempted.append(victim)
                preemptions += 1
                continue
            i = running[turn]
            held[i] += 1
            blocks[i] = -(-held[i] // SIZE)
            turn += 1
        waiting = sorted(waiting + preempted)
        decodes, context = len(running), sum(held.values())
        computed, prompts, refused = decodes, 0, False
        while waiting and waiting[0] not in preempted:
            i = waiting[0]
            tokens = lens[i][1] + done[i]
            if computed + tokens > 60:
                break
            if free() - -(-tokens // SIZE) < (watermark if running else 0):
                refused = True
                break
            waiting.pop(0)
            held[i], blocks[i] = tokens, -(-tokens // SIZE)
            running = sorted([*running, i])
            start.setdefault(i, now)
            computed, prompts = computed + tokens, prompts + 1
        short = refused or bool(preempted)
        if short:
            kept |= {i for i in waiting if i not in start}
        now += 1.0 + 0.013 * computed + 0.0007 * context + 0.11 * prompts * (decodes > 0)
        for i in list(running):
            done[i] += 1
            if done[i] == lens[i][2]:
                running.remove(i)
                del held[i], blocks[i]
                finish[i] = now
    return preemptions, kept, start, finish


@pytest.mark.parametrize("seed", range(12))
def test_paging_serves_as_a_naive_server_does(seed):
    """Who is held up, and when each request runs, in pools of every size."""
    columns = tiny(seed)
    compared = preempted = kept_waiting = 0
    for num_blocks in range(2, 90):
        want, found = naive_paged(columns, num_blocks), serve(columns, SERVER, "paged", num_blocks)
        assert (want is None) == (found is None), num_blocks
        if want is None:
            continue
        preemptions, kept, start, finish = want
        assert (found.preemptions, found.kept_waiting) == (preemptions, len(kept)), num_blocks
        ids = range(len(columns[0]))
        assert found.starts.tolist() == pytest.approx([start[i] for i in ids])
        assert found.finishes.tolist() == pytest.approx([finish[i] for i in ids])
        compared += 1
        preempted += preemptions
        kept_waiting += len(kept)
    assert compared > 50 and preempted > 20 and kept_waiting > 50


class Counting(Observer):
    """Who waits behind missing blocks, seen in every iteration, request by request."""

    def __init__(self, arrivals):
        self.arrivals, self.started, self.kept, self.short = arrivals, set(), set(), False
        self.preemptions = 0
        self.seen = 0

    def look(self, scheduler, iteration):
        there = {i for i, at in enumerate(self.arrivals) if at <= iteration.start_s}
        if self.short:
            self.kept |= there - self.last
        self.last = there
        self.started |= {group.group_id for group in iteration.prefills}
        self.preemptions += iteration.num_swaps + iteration.num_recomputations
        self.short = scheduler.short_of_blocks
        if self.short:
            self.kept |= there - self.started


def plainly(columns, policy, num_blocks):
    """The same counts from the simulator's plain mode, with sets in place of counters."""
    counting = Counting(columns[0])
    groups = [SequenceGroup(i, [Sequence(i, p, o)], t) for i, (t, p, o) in enumerate(zip(*columns))]
    simulate(
        groups,
        new_manager(policy, num_blocks, SIZE, max_len=MAX_LEN),  # block by block, for max too
        SERVER.limits,
        LATENCY,
        on_decision=counting.look,
        plain=True,
    )
    return counting.preemptions, len(counting.kept)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(4))
def test_event_by_event_counts_what_iteration_by_iteration_counts(policy, seed):
    columns = tiny(seed, 24, 1.5)
    counts = set()
    for num_blocks in range(16, 330, 5):
        found = serve(columns, SERVER, policy, num_blocks)
        if found is None:
            continue
        assert (found.preemptions, found.kept_waiting) == plainly(columns, policy, num_blocks)
        assert policy == "paged" or found.preemptions == 0
        counts.add(found.held_up)
    assert len(counts) > 4 and min(counts) == 0


@SERVERS
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(6))
def test_the_smallest_memory_is_what_trying_all_finds(policy, seed, server):
    columns = tiny(seed)
    free = unbounded(columns, server)
    held_up = {}
    for num_blocks in range(2, 250):
        found = serve(columns, server, policy, num_blocks)
        held_up[num_blocks] = math.inf if found is None else found.held_up
    pools = {}
    for rate in (0.0, 0.1, 0.3):
        few = allowed(rate, 16)
        pool = smallest_pool(columns, server, policy, rate, free, pools.get(0.0))
        pools[rate] = pool
        assert held_up[pool.num_blocks] <= few < held_up[pool.num_blocks - 1]
        assert pool.served.held_up == held_up[pool.num_blocks]
        if rate == 0.0:  # more never serves worse
            assert pool.num_blocks == min(n for n, count in held_up.items() if count == 0)
            assert (pool.served.starts == free.starts).all()
            assert (pool.served.finishes == free.finishes).all()
    assert pools[0.3].num_blocks <= pools[0.1].num_blocks <= pools[0.0].num_blocks


@SERVERS
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(6))
def test_the_run_with_unbounded_memory_tells_which_memories_serve(
    policy, seed, server, monkeypatch
):
    """Contiguous ones all, of paging those that a start finds too small; so little is served."""
    columns = tiny(seed)
    free, told = unbounded(columns, server), 0
    for num_blocks in range(2, 250):
        sure = holds_up_none(free, columns, server, policy, num_blocks)
        served = serve(columns, server, policy, num_blocks, 0) is not None
        assert sure == served or (policy == "paged" and sure is None)
        told += sure is not None
    assert told == 248 if policy != "paged" else told > 20
    calls = []
    monkeypatch.setattr(trace_needs, "serve", lambda *args: calls.append(args) or serve(*args))
    smallest_pool(columns, server, policy, 0.0, free)
    assert not calls if policy != "paged" else 1 <= len(calls) <= 9
    calls.clear()
    smallest_pool(columns, server, policy, 0.3, free)
    chunks = [num_blocks // (16 if policy == "max" else 1) for *_, num_blocks, _, _ in calls]
    assert calls and len(set(chunks)) == len(chunks), "one more block that serves nobody"


def test_a_chunk_of_the_longest_model_costs_no_more_than_one_block():
    """Max reserves the model's maximum, a list of blocks each if it were kept block by block."""
    manager = Server(1, 10**6, LATENCY, Limits(60, 10**9)).manager("max", 10**7)
    for i in range(9):
        manager.allocate(i, 1, 2)
    with pytest.raises(OutOfBlocksError):
        manager.allocate(9, 1, 2)
    assert [len(manager.free(i)) for i in range(9)] == [1] * 9


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_the_number_of_servers_is_what_trying_all_finds(policy, rate):
    columns = tiny(3, 24, 1.0)
    for num_blocks in (16, 30, 60):
        serving = []
        for servers in range(1, 25):
            parts = [tuple(c[i::servers] for c in columns) for i in range(servers)]
            found = [serve(part, SERVER, policy, num_blocks) for part in parts]
            if all(found) and sum(one.held_up for one in found) <= allowed(rate, 24):
                serving.append(servers)
        runs = {}  # of this policy and of others
        for other in POLICIES:
            servers_needed(columns, SERVER, other, 0.0, num_blocks, runs=runs)
        for guess, there in ((1, runs), (7, None), (24, runs)):
            servers = servers_needed(columns, SERVER, policy, rate, num_blocks, guess, runs=there)
            assert servers in serving and servers - 1 not in serving
        assert servers_needed(columns, SERVER, policy, rate, num_blocks, known=24) in serving


def test_no_number_of_servers_for_a_request_that_fits_none():
    columns = ([0.0, 1.0], [3, 30], [2, 9])
    assert servers_needed(columns, SERVER, "max", 0.0, 9) is None
    assert servers_needed(columns, SERVER, "paged", 0.0, 9) is None
    assert servers_needed(columns, SERVER, "paged", 0.0, 12) == 1
    assert serve(columns, SERVER, "paged", 9) is None


def test_no_more_servers_than_requests():
    """All at once, each in a pool of its own."""
    columns = ([0.0] * 5, [20] * 5, [20] * 5)
    assert servers_needed(columns, SERVER, "oracle", 0.0, 16) == 5
    assert servers_needed(columns, SERVER, "oracle", 0.4, 16) == 3


def test_concurrency_by_hand():
    server = Server(SIZE, MAX_LEN, UNIT, Limits(100, 10))
    found = serve(([0.0, 0.0, 5.0, 20.0], [4, 4, 4, 4], [10, 5, 3, 2]), server, "paged", 50)
    assert found.starts.tolist() == [0.0, 0.0, 5.0, 20.0]
    assert found.finishes.tolist() == [10.0, 5.0, 8.0, 22.0]
    assert found.peak == 2  # the third starts as the second ends
    assert found.mean == (10 + 5 + 3 + 2) / 22
    assert found.together(np.array([3, 1, 2, 7])).max() == 7
    assert found.held_up == found.preemptions == found.kept_waiting == 0


def test_who_waits_for_tokens_of_an_iteration_is_not_held_up_by_memory():
    server = Server(SIZE, MAX_LEN, UNIT, Limits(40, 10**9))
    columns = ([0.0] * 6, [30] * 6, [9] * 6)
    assert serve(columns, server, "paged", 1000).held_up == 0
    assert serve(columns, server, "paged", 13).held_up > 4


def test_a_run_ends_as_soon_as_too_many_are_held_up():
    columns = tiny(0, 24, 0.5)
    found = serve(columns, SERVER, "paged", 16)
    assert serve(columns, SERVER, "paged", 16, found.held_up).held_up == found.held_up
    assert serve(columns, SERVER, "paged", 16, found.held_up - 1) is None
    watch = Watch([0.0, 1.0])
    assert (watch.preemptions, watch.kept_waiting, watch.starts) == (0, 0, {})


@pytest.mark.parametrize("collecting", [True, False])
def test_serving_leaves_the_garbage_collector_as_it_was(collecting):
    """After a trace that is served, and after one that is not."""
    was = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        assert serve(tiny(0), SERVER, "paged", 90) and gc.isenabled() is collecting
        assert serve(tiny(0), SERVER, "paged", 1) is None and gc.isenabled() is collecting
    finally:
        (gc.enable if was else gc.disable)()


def test_unbounded_memory_doubles_until_it_is_one(monkeypatch):
    columns = tiny(5, 30, 0.2)
    want = unbounded(columns, SERVER)
    monkeypatch.setattr(trace_serving, "FIRST_POOL", 2)
    assert (unbounded(columns, SERVER).finishes == want.finishes).all()
    monkeypatch.setattr(trace_serving, "LARGEST_POOL", 64)
    with pytest.raises(TraceTooLargeError, match="more than 64 blocks of 4 slots at a time"):
        unbounded(columns, SERVER)


@pytest.mark.parametrize("answer", [1, 2, 3, 17, 128, 999, 1000, 1999])
def test_the_search_finds_the_smallest_from_any_guess(answer):
    for guess in (-5, 1, 2, 100, 2000, 10**9):
        tried = []

        def serves(n, tried=tried):
            tried.append(n)
            return n >= answer

        assert smallest(serves, guess, 5000) == answer
        assert all(1 <= n <= 5000 for n in tried) and len(tried) < 45
        assert smallest(serves, guess, 5000, creep=True) == answer
        assert smallest(serves, guess, 5000, least=answer) == answer
        assert smallest(serves, guess, answer) == answer
        if answer > 1:
            assert smallest(serves, guess, answer - 1) is None


def test_large_numbers_are_found_to_a_part_in_a_thousand():
    for answer in (2000, 31_415, 10**7 + 1):
        for guess in (1, answer // 2, answer, 3 * answer):
            found = smallest(lambda n, answer=answer: n >= answer, guess, 10**9)
            assert answer <= found <= answer * (1 + 1 / (EXACT - 1))


def test_allowed_counts_whole_requests():
    assert [allowed(0.01, n) for n in (99, 100, 199, 200)] == [0, 1, 1, 2]
    assert allowed(0.07, 100) == 7 and allowed(0.29, 100) == 29  # 0.29 * 100 is 28.999...
    assert allowed(0.0, 10**9) == 0


def test_chunks_are_what_the_manager_takes():
    rng = np.random.default_rng(2)
    prompts = rng.integers(1, 25, 60)
    outputs = np.minimum(rng.integers(1, 40, 60), MAX_LEN - prompts)
    for policy in POLICIES[:3]:
        manager = SERVER.manager(policy, 16 * 60)
        for i, (prompt, output) in enumerate(zip(prompts.tolist(), outputs.tolist())):
            manager.allocate(i, prompt, prompt + output)
        taken = [manager.reservation(i).num_blocks * manager.block_size for i in range(60)]
        assert (SIZE * SERVER.chunks(policy, prompts, outputs)).tolist() == taken
    assert SERVER.chunks("paged", np.array([4, 5]), np.array([4, 4])).tolist() == [2, 3]
