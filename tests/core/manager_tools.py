"""What the tests of the managers share: snapshots, random states, the asserts of a module."""

import ast
import copy
import dataclasses
import inspect
import random
import re
import textwrap

import pytest

from kv_cache_manager import CacheError, PagedKVCacheManager, UnknownSequenceError
from sequence import Sequence, SequenceGroup


def observable(manager):
    """All that a caller can tell apart, copied: two equal snapshots mean that nothing happened."""
    if not isinstance(manager, PagedKVCacheManager):
        buddy = manager._buddy
        return {
            "reservations": {
                i: (r.start_block, r.num_blocks, r.asked, r.final_len, manager.num_tokens(i))
                for i, r in ((i, manager.reservation(i)) for i in manager.running_ids)
            },
            "running_ids": manager.running_ids,
            "free chunks": [frozenset(starts) for starts in buddy.free_chunks],
            "taken chunks": dict(buddy.chunk_order),
            "num_free_blocks": manager.num_free_blocks,
            "usage": manager.usage(),
        }
    tables = {"running": manager._tables, "swapped": manager._swapped}
    tables["prefixes"] = manager._prefixes
    state = {
        name: {i: (tuple(t.blocks), t.num_tokens, t.num_prefix_blocks) for i, t in held.items()}
        for name, held in tables.items()
    }
    for name, pool in (("gpu", manager._gpu), ("cpu", manager._cpu)):
        state[f"{name} free"] = frozenset(pool.free_blocks)
        state[f"{name} references"] = dict(pool.extra_refs)
    state["running_ids"] = manager.running_ids
    state["usage"] = manager.usage()
    return state


def refused(manager, error, call, match=None):
    """`call` raises exactly `error`, and nothing has changed."""
    before = observable(manager)
    with pytest.raises(error, match=match) as caught:
        call()
    assert caught.type is error
    assert observable(manager) == before
    manager.check_invariants()


def shape(manager):
    """The running tables with blocks renumbered as they are met: equal up to relabelling."""
    names = {}
    tables = {
        i: [names.setdefault(block, len(names)) for block in manager.block_table(i).blocks]
        for i in sorted(manager.running_ids)
    }
    lengths = {i: manager.num_tokens(i) for i in sorted(manager.running_ids)}
    references = {names[b]: manager.ref_count(b) for b in names}
    return tables, lengths, references, manager.usage()


def fill(manager, leave, filler_id=10**6):
    """Let a shared prefix, which never grows, take all GPU blocks but `leave`."""
    take = manager.num_free_blocks - leave
    assert take >= 0
    if take:
        manager.allocate_prefix(filler_id, take * manager.block_size)


def group_of(ids, prompt_len, generated=None, prefix_len=0, prefix_id=None, output_len=64):
    """A group of sequences that have generated so many tokens before (none unless told)."""
    generated = generated or [0] * len(ids)
    seqs = [Sequence(i, prompt_len, output_len, prefix_len, n) for i, n in zip(ids, generated)]
    return SequenceGroup(0, seqs, prefix_id=prefix_id)


def add_to(name, count=1):
    """What corrupts a sum of a manager or an allocator, in a field of that name."""
    return lambda thing: setattr(thing, name, getattr(thing, name) + count)


def random_manager(seed, steps=25, num_blocks=24, num_cpu_blocks=12):
    """A manager after a random legal history: shared, part-filled, swapped, with prefixes."""
    rng = random.Random(seed)
    size = rng.choice((1, 2, 3, 4))
    order = rng.sample(range(num_blocks), num_blocks)
    manager = PagedKVCacheManager(
        num_blocks, size, num_cpu_blocks=num_cpu_blocks, watermark=0.0, free_order=order
    )
    fresh = iter(range(NUM_IDS))
    for _ in range(steps):
        running, swapped = manager.running_ids, swapped_ids(manager)
        prefixes = prefix_ids(manager)
        action = rng.choice(
            ["allocate", "prefix", "fork", "fork", "append", "append", "append_all", "append_all"]
            + ["reorder", "swap_out", "swap_in", "free"]
        )
        try:
            if action == "prefix" and len(prefixes) < 2:
                manager.allocate_prefix(next(fresh), rng.randint(1, 2 * size))
            elif action == "allocate" or not running:
                prefix_id = rng.choice([None, *prefixes])
                manager.allocate(next(fresh), rng.randint(1, 2 * size + 1), prefix_id)
            elif action == "fork":
                manager.fork(rng.choice(running), next(fresh))
            elif action == "append":
                manager.append(rng.choice(running), rng.randint(1, size + 1))
            elif action == "append_all":
                manager.append_all(rng.randint(1, 2))
            elif action == "reorder":
                manager.reorder({child: rng.choice(running) for child in running[:3]})
            elif action == "swap_out":
                manager.swap_out(rng.sample(running, rng.randint(1, min(2, len(running)))))
            elif action == "swap_in" and swapped:
                manager.swap_in(swapped)
            elif action == "free" and len(running) > 2:
                manager.free(rng.choice(running))
        except CacheError:
            pass  # refused: nothing has changed, and the history goes on
    manager.check_invariants()
    return manager


NUM_IDS = 40  # those that random_manager gives are below


def prefix_ids(manager):
    """The shared prefixes of a random manager."""
    return [
        i for i in range(NUM_IDS) if i not in manager.running_ids and known(manager.num_tokens, i)
    ]


def swapped_ids(manager):
    """Its sequences that are swapped out."""
    return [i for i in range(NUM_IDS) if known(manager.can_swap_in, [i])]


def known(ask, what):
    try:
        ask(what)
    except UnknownSequenceError:
        return False
    return True


def clone(manager):
    """An independent copy: both go on from the same state."""
    return copy.deepcopy(manager)


def assert_messages(*objects):
    """The message of every assert in the source of modules or functions, {} for each field."""
    messages = []
    for thing in objects:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(thing)))):
            if isinstance(node, ast.Assert):
                assert node.msg is not None, f"line {node.lineno} of {thing}: assert says nothing"
                if isinstance(node.msg, ast.Constant):
                    messages.append(node.msg.value)
                else:
                    parts = (getattr(part, "value", None) for part in node.msg.values)
                    messages.append("".join(p if isinstance(p, str) else "{}" for p in parts))
    return messages


def pattern(message):
    """A regular expression for a message of assert_messages."""
    return "^" + ".*".join(re.escape(part) for part in message.split("{}"))


def manager_of(num_blocks=32, size=4, cpu=0, watermark=0.0, order=()):
    """A manager that hands out the blocks of `order` first, then the others upwards."""
    order = [*order, *(block for block in range(num_blocks) if block not in order)]
    return PagedKVCacheManager(
        num_blocks, size, num_cpu_blocks=cpu, watermark=watermark, free_order=order
    )


def blocks_of(manager, *ids):
    return [manager.block_table(i).blocks for i in ids]


def wrong(name, count, total="free"):
    """A part of the usage that is off, at the cost of another."""

    def corrupt(m):
        right = m.usage()
        parts = {name: getattr(right, name) + count}
        if name in right.PARTS:
            parts[total] = getattr(right, total) - count
        m.usage = lambda: dataclasses.replace(right, **parts)

    return corrupt
