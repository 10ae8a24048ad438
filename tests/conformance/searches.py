"""A search to its end, and the figures of several."""

from vllm_sim.conformance.search import Search


def search(adapter, world):
    return Search(adapter, world, seconds=10**6).run()


def figures(*found):
    """What several searches went through together, each to its end."""
    assert all(one.closed and one.fault is None for one in found)
    sums = {
        "states": sum(f.states for f in found),
        "transitions": sum(f.transitions for f in found),
    }
    return sums | {"seconds": round(sum(f.seconds for f in found), 1)}
