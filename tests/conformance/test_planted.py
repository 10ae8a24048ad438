"""Each check sees a fault that was planted for it, in as few operations as it takes.

The engine of small_engine.py is sound, which is seen first; then one method is wrong. What makes no
difference to any caller is no fault, and is not found: the last test.
"""

import pytest
from small_engine import NoRoomError, SmallAdapter, SmallEngine

from vllm_sim.conformance import search as searching
from vllm_sim.conformance.adapter import Forbidden, Operation, Pass, Step
from vllm_sim.conformance.report import lines, replayed
from vllm_sim.conformance.search import Search


def searched(world="small", seconds=60, without=(), **planted):
    """A search of the engine with these methods in place of its own; `adapter_...` are the
    adapter's."""
    ours = {name: method for name, method in planted.items() if not name.startswith("adapter_")}
    engine = type("Planted", (SmallEngine,), ours)
    of_adapter = {name[8:]: method for name, method in planted.items() if name not in ours}
    adapter = type("PlantedAdapter", (SmallAdapter,), {"engine": engine, **of_adapter})
    search = Search(adapter, adapter.worlds[world], seconds=seconds, without=without)
    search.run()
    return search


def test_the_engine_is_sound_as_it_stands():
    found = searched().found
    assert found.closed and found.clean
    assert found.silent.keys() == {"fork: it ends at once"}


# ---- what is planted ----------------------------------------------------------------------------


def forgets_a_block(engine, name):
    for block in engine.live.pop(name).blocks[:2]:
        engine.drop(block)


def frees_twice(engine, name):
    last = engine.live[name].blocks[-1]
    SmallEngine.release(engine, name)
    if not engine.refs[last]:
        engine.free.append(last)


def frees_what_others_hold(engine, block):
    engine.refs[block] -= 1
    if block not in engine.free:
        engine.free.append(block)


def frees_what_is_not_there(engine, name):
    SmallEngine.release(engine, name)
    engine.free.append(9)


def counts_one_too_few(engine, name, child):
    SmallEngine.fork(engine, name, child)
    engine.refs[engine.live[name].blocks[-1]] -= 1


def copies_nothing(engine, request):
    return []


def copies_backwards(engine, request):
    return [(new, old) for old, new in SmallEngine.copy_on_write(engine, request)]


def hits_one_too_many(engine, tokens):
    """The last block that is found is not computed: another's, of other tokens."""
    hits = SmallEngine.hits(engine, tokens)
    if hits * engine.size + engine.size < len(tokens) and engine.cache:
        engine.cache.setdefault(
            tuple(tokens[: (hits + 1) * engine.size]), min(engine.cache.values())
        )
    return SmallEngine.hits(engine, tokens)


def computes_too_little(engine, request):
    """A block is given and taken as computed."""
    SmallEngine.grow(engine, request)
    request.stored = max(request.stored, len(request.blocks) * engine.size - engine.size)


def remembers_what_is_overwritten(engine):
    return engine.free.pop(0)


def half_done(engine, name, tokens, count):
    try:
        SmallEngine.submit(engine, name, tokens, count)
    except NoRoomError:
        engine.cache.clear()
        raise


def counted_all_the_same(engine, name, tokens, count):
    try:
        SmallEngine.submit(engine, name, tokens, count)
    except NoRoomError:
        engine.refs[0] += 1
        raise


def wrong_error(engine, name, tokens, count):
    try:
        SmallEngine.submit(engine, name, tokens, count)
    except NoRoomError as error:
        raise RuntimeError("no room") from error


def takes_one_more(engine, request):
    SmallEngine.grow(engine, request)
    if engine.free:
        request.blocks.append(engine.take())
        engine.refs[request.blocks[-1]] += 1


def releases_twice(engine, name):
    SmallEngine.release(engine, name)
    engine.live.pop(name).blocks.clear()


def never_ends(engine):
    """Where nobody finds room, nobody gives way."""
    copies, parts = SmallEngine.step(engine) if len(engine.live) < 2 else ([], [])
    return copies, parts


def leaves_its_table(adapter):
    """The adapter's own: requests that have ended, and still hold blocks."""
    offered = SmallAdapter.operations(adapter)
    live = [request for request in adapter.small.live.values() if request.left > 1]
    return [one for one in offered if live or one.name != "step"]


def submits_what_has_no_room(adapter, operation):
    return SmallAdapter.apply(adapter, operation) if operation.refusal is None else Step()


def tells_more_tokens(adapter):
    told = SmallAdapter.tables(adapter)
    return {who: (held, [1] * (2 * len(held) + 1)) for who, (held, _) in told.items()}


def tells_other_slots(adapter, operation):
    step = SmallAdapter.apply(adapter, operation)
    cut = [Pass(*one[:3], one.slots[:-1]) for one in step.passes]
    return Step(step.copies, cut)


def copies_into_one_slot(adapter, operation):
    step = SmallAdapter.apply(adapter, operation)
    pairs = [[(old, pairs[0][1]) for old, _ in pairs] for pairs in step.copies if pairs]
    return Step(pairs, step.passes)


@pytest.mark.parametrize(
    ("check", "told", "planted"),
    [
        ("partition", "blocks lost", {"release": forgets_a_block}),
        ("partition", "free twice", {"release": frees_twice}),
        ("partition", "free and in use", {"drop": frees_what_others_hold}),
        ("partition", "free and cached", {"adapter_cache_holds": True}),
        ("partition", "no such blocks: [9]", {"release": frees_what_is_not_there}),
        ("references", "tables that hold it", {"fork": counts_one_too_few}),
        ("unwritten", "nobody has written", {"copy_on_write": copies_backwards}),
        ("contents", "which holds", {"hits": hits_one_too_many}),
        ("contents", "cached block", {"take": remembers_what_is_overwritten}),
        ("unwritten", "nobody has written", {"grow": computes_too_little}),
        ("overwrite", "written twice", {"copy_on_write": copies_nothing}),
        ("overwrite", "two copies", {"adapter_apply": copies_into_one_slot}),
        ("slots", "in other slots", {"adapter_apply": tells_other_slots}),
        ("slots", "tokens in", {"adapter_tables": tells_more_tokens}),
        ("refusal", "changed something", {"submit": half_done}),
        ("refusal", "changed something", {"submit": counted_all_the_same}),
        ("refusal", "no NoRoomError", {"adapter_apply": submits_what_has_no_room}),
        ("refusal", "not NoRoomError", {"submit": wrong_error}),
        ("blocks taken", "blocks, not", {"grow": takes_one_more}),
        ("exception", "KeyError", {"finish": releases_twice}),
        ("no end", "never ends", {"step": never_ends}),
        ("end", "still have tables", {"adapter_operations": leaves_its_table}),
    ],
)
def test_what_is_planted_is_found(check, told, planted):
    search = searched(**planted)
    found = search.found
    assert found.fault.check == check and told in str(found.fault), found.fault
    transitions = found.transitions
    # It is replayed from nothing, and no operation of it can be left out.
    fault, done = search.replay(found.history, check == "no end")
    assert (fault.check, done) == (check, len(found.history))
    assert search._smaller(found.history, check) == found.history
    steps = [line.split("\n")[0] for line in replayed(search)[:done]]
    assert steps == [f"{at}. {one}" for at, one in enumerate(found.history, 1)]
    shown = "\n".join(lines("small", "small", search, "plain"))
    assert shown.isascii() and f"{done + 1}. " not in shown and f"=> {check}" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert search.found.transitions == transitions, "what is replayed counts nowhere"


def test_what_does_not_hold_at_the_start_is_a_fault_of_no_operations():
    def starts(adapter, world):
        SmallAdapter.start(adapter, world)
        adapter.small.free.append(0)

    search = searched(adapter_start=starts)
    assert (search.found.fault.check, search.found.history) == ("partition", ())
    assert "=> partition: a block is free twice" in "\n".join(lines("s", "small", search, "plain"))


def test_an_engine_that_tells_no_tables_any_more_is_a_fault_with_a_history():
    def tables(adapter):
        if any(request.stored for request in adapter.small.live.values()):
            raise KeyError("a block")
        return SmallAdapter.tables(adapter)

    search = searched(adapter_tables=tables)
    assert search.found.fault.check == "exception"
    told = "\n".join(lines("small", "small", search, "plain"))
    assert "2. step()\n   tables cannot be told: KeyError('a block')" in told


def test_a_fault_that_does_not_come_again_is_told_so():
    """Whoever calls an engine once more may find another one: clocks, orders of sets."""
    once = iter([True])

    def step(engine):
        if len(engine.live) > 1 and next(once, False):
            raise RuntimeError("now and then")
        return SmallEngine.step(engine)

    search = searched(step=step)
    assert search.found.fault.check == "exception"
    told = lines("small", "small", search, "plain")
    assert "=> nothing this time; when it was found: exception: step()" in "\n".join(told)


@pytest.mark.parametrize(
    "planted", [{"release": forgets_a_block}, {"drop": frees_what_others_hold}]
)
def test_at_random_the_same_is_found_in_as_few_operations(planted, monkeypatch):
    least = searched(**planted).found
    monkeypatch.setattr(searching, "MOST_STATES", 0)
    found = searched(**planted).found
    assert not found.closed and found.fault.check == least.fault.check
    assert len(found.history) <= len(least.history) + 2


def test_at_random_what_never_ends_is_told_by_what_leads_there(monkeypatch):
    monkeypatch.setattr(searching, "MOST_STATES", 0)
    found = searched(step=never_ends).found
    assert not found.closed and found.fault.check == "no end" and len(found.history) == 2


def test_what_an_engine_forbids_is_told_by_where_it_says_so():
    def told(adapter, operation, where="its README", change=False):
        if operation.name == "fork":
            adapter.submitted.append(len(adapter.submitted)) if change else None
            raise Forbidden("it has no forks", where)
        return SmallAdapter.apply(adapter, operation)

    found = searched(adapter_apply=told).found
    assert found.fault is None and "fork: it has no forks" in found.happened and not found.silent
    found = searched(adapter_apply=lambda adapter, one: told(adapter, one, "")).found
    assert found.silent.keys() == {"fork: it has no forks"} and "fork" in found.missing
    found = searched(adapter_apply=lambda adapter, one: told(adapter, one, "", True)).found
    assert found.fault.check == "refusal" and "forbidden, and changed" in str(found.fault)


def test_checks_can_be_left_out_to_see_what_a_fault_leads_to():
    """A block that others still hold is free: seen at once, or only where somebody reads it."""
    first = searched(drop=frees_what_others_hold).found
    later = searched(without=("partition", "references"), drop=frees_what_others_hold).found
    assert first.fault.check == "partition"
    assert later.fault.check in ("overwrite", "contents")
    assert len(later.history) > len(first.history)


def test_a_search_that_did_not_meet_what_it_must_is_not_clean():
    must = (*SmallAdapter.required, "swap")
    search = searched(adapter_required=must)
    assert search.found.fault is None and search.found.missing == ("swap",)
    assert not search.found.clean
    told = lines("small", "small", search, "plain")[0].split()
    assert told[-3:] == ["it", "proves", "little"]


def test_engines_that_cannot_be_copied_are_called_again_from_the_start():
    search = searched()
    again = searched(adapter_replayed=True).found
    whole = search.found
    assert (again.states, again.transitions) == (whole.states, whole.transitions)
    assert (again.depth, again.events) == (whole.depth, whole.events)
    found = searched(adapter_replayed=True, release=forgets_a_block).found
    assert found.history == searched(release=forgets_a_block).found.history


def test_what_makes_no_difference_is_not_found():
    """Another order of the free list, and counters that nobody reads."""

    def from_the_end(engine):
        engine.free.reverse()
        block = SmallEngine.take(engine)
        engine.free.reverse()
        return block

    assert searched(take=from_the_end).found.clean


def test_an_operation_that_is_not_offered_is_no_history():
    search = searched()
    assert search.replay([Operation("fork", ("9",))]) == (None, 0)
    assert search.replay([]) == (None, 0)
