"""What no other test reaches: the rarely taken side of a branch, and refusals deep inside.

Found by `make coverage`. What only a CUDA device reaches is named in pyproject.toml instead.
"""

import pytest

from allocators import DuplicateSequenceError
from kv_cache_manager import BaselineCacheManager
from sequence import BlockTable, Clock, Sequence, SequenceGroup


def test_an_empty_block_table_has_no_entries():
    table = BlockTable([], 4, 0, Clock())
    assert table.entries() == [] and table.num_tokens == 0


def test_a_sequence_that_has_a_reservation_is_not_admitted_again():
    manager = BaselineCacheManager(64, 16, policy="oracle")
    manager.allocate(1, 10, 20)
    group = SequenceGroup(1, [Sequence(1, 10, 20)])
    for admit in (manager.admit, manager.try_admit):
        with pytest.raises(DuplicateSequenceError, match="sequence 1 exists already"):
            admit(group)
