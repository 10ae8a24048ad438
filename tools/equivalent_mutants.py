"""The mutants that survive tools/mutants.py, and why nothing can tell each from the code.

{module: {function: {the line as the mutant has it: reason}}}; the function of a class body or of
the module itself is "".
"""

ITS_WAY = "the long way for all: the same result, later"
ONE_OBJECT = "integers below 257 are one object each in Python, and a chunk's order is far below"
COUNTED = "a block that is counted has at least one more reference"
COUNT = "a count of tokens is at least one, as is checked"
BOUND = "a bound that is too high only makes it count exactly"
NOTHING_MISSING = "fewer slots are unfilled than a block has, so what is rounded up is 0 at least"
NO_TURN = "who is due after the last step has no turn in it"
EARLIER = "when what is void is cleared changes no answer"

REASONS: dict[str, dict[str, dict[str, str]]] = {
    "allocator.py": {
        "drop": {
            "if not extra and extra.keys().isdisjoint(blocks):": ITS_WAY,
            "elif others <= 1:": COUNTED,
        },
        "take": {
            "if count <= 0:": "no count is below 0, as is asserted",
            "while source != order:  # keep the lower half, return the upper one":
                "it begins at the order or above, and goes down by one",
            "while source is not order:  # keep the lower half, return the upper one": ONE_OBJECT,
        },
        "replace": {"if others <= 1:": COUNTED},
        "give_back": {
            "while order != self.max_order:": "no order is above the largest",
            "while order is not self.max_order:": ONE_OBJECT,
        },
        "check_invariants": {
            'assert start % (1 << order) <= 0, f"chunk at {start} is not aligned to its size"':
                "no remainder is below 0",
        },
        "move_blocks": {"if count != 1:": "a block that is held is held at least once"},
    },
    "static_batching.py": {
        "simulate_static": {
            "now, first, count = -1.0, 0, len(arrivals)": "no request arrives before time 0",
            "while first != count:": "a batch ends at the last request at most",
            "while end != count and end - first < batch_size and arrivals[end] <= now:":
                "the end moves by one, and is at most at the last request when the loop begins",
            "while end < count and end - first != batch_size and arrivals[end] <= now:":
                "a batch grows by one from one, and its largest size is at least one",
        },
    },
    "baseline_manager.py": {
        "__init__": {
            "self._empty = BuddyAllocator(num_blocks, 2 << self._buddy.max_order)"
            "  # never taken from":
                "an empty pool in larger pieces has as many chunks of every size that is asked for",
        },
        "slots_to_ask": {
            "usual = type(num_tokens) is type(final_len) == int and max_len is None":
                "a type is equal only to itself",
            "usual = type(num_tokens) == type(final_len) is int and max_len is None":
                "a type is equal only to itself",
            "if not usual or not 1 < num_tokens <= final_len:": ITS_WAY,
            "if not usual or not 0 < num_tokens == final_len:": ITS_WAY,
            "if not usual or not 0 < num_tokens is final_len:": ITS_WAY,
            "if not usual or not 0 < num_tokens < final_len:": ITS_WAY,
            'if self.policy >= "pow2":': 'of the two names left only "pow2" is not below it',
            'if self.policy <= "max":': 'of the three names "max" is the least',
        },
        "try_admit": {
            "if len(group.seqs) == 0:  # most requests: no detour": ITS_WAY,
            "if len(group.seqs) < 1:  # most requests: no detour": ITS_WAY,
            "if len(group.seqs) <= 1:  # most requests: no detour": "no group is empty",
            "seq = group.seqs[ -1]": "of one sequence",
        },
        "can_append": {
            "return all(self.num_tokens(i) != self.reservation(i).final_len for i in seq_ids)":
                "no sequence is longer than its final length",
        },
        "_note_full": {
            "if len(heap) > 63 + 4 * len(self._held):"
            "  # mostly void, and no step has cleared them": EARLIER,
            "if len(heap) > 64 + 3 * len(self._held):"
            "  # mostly void, and no step has cleared them": EARLIER,
        },
        "check_invariants": {
            'assert len(chunks) >= len(self._held), "two sequences hold the same chunk"':
                "a dictionary of the reservations has at most as many entries",
            'assert r.num_blocks <= 1 << (least - 1).bit_length(), '
            '"chunk not the next power of two"':
                "it is a power of two and holds what was asked for, as is asserted before",
        },
        "_first_full": {
            "if self._held.get(seq_id) is held and step <= held.final_len - held.start_len:":
                "what was noted before an append is later than what is true since",
            "if self._held.get(seq_id) == held and step == held.final_len - held.start_len:":
                "a reservation is equal only to itself",
            "if self._held.get(seq_id) is held and step >= held.final_len - held.start_len:":
                "of what was noted of a reservation the true step is the first",
        },
    },
    "paged_tables.py": {
        "append_all": {
            "if num_tokens != 1:  # a table's blocks, and a copy for each that is loose": COUNT,
            "if need != self.num_free_blocks:": BOUND,
            "if need >= self.num_free_blocks:": BOUND,
            "if need is not self.num_free_blocks:": BOUND,
            "if num_tokens > 0:  # a table's blocks, and a copy for each that is loose": BOUND,
            "if num_tokens >= 1:  # a table's blocks, and a copy for each that is loose": BOUND,
            "for ahead in range(num_tokens if num_tokens == size else size):": NO_TURN,
            "for ahead in range(num_tokens if num_tokens is size else size):": NO_TURN,
            "for ahead in range(num_tokens if num_tokens <= size else size):": NO_TURN,
            "need = len(self._tables) * -(-num_tokens - size) + len(self._loose)": BOUND,
            "need = len(self._tables) * -(-num_tokens * size) + len(self._loose)": BOUND,
            "need = len(self._tables) * -(~num_tokens // size) + len(self._loose)": BOUND,
        },
        "blocks_for_step": {
            "if num_tokens < ONE and not self._loose:": f"no step is shorter than one; {ITS_WAY}",
            "if num_tokens <= ONE and not self._loose:": "no step is shorter than one",
            "if num_tokens == ONE and not self._loose:": "what equals one is one, here",
            "if missing > -1:": NOTHING_MISSING,
            "if missing >= 0:": NOTHING_MISSING,
            "if missing != 0:": NOTHING_MISSING,
        },
        "blocks_for_append": {"need += table.room <= 0": "no table has less room than none"},
        "_extend": {
            "new = max( -1, -(-(num_tokens - unfilled) // self.block_size))": NOTHING_MISSING,
            "copy = table.held != 0 and self._gpu.ref_count(table.blocks[-1]) > 1":
                "no table withholds fewer slots than none",
            "copy = table.held > 0 and self._gpu.ref_count(table.blocks[-1]) != 1":
                "a block that is held is held at least once",
        },
    },
    "scheduler.py": {
        "complete": {
            "if self._next_events and self._next_events[0] == now:":
                "no step goes beyond the next event",
        },
    },
}  # fmt: skip
