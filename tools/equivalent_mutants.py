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
ITSELF = "members of an enumeration are equal only to themselves"
ONE_PROMPT = "a group whose prompts differ cannot be made"
SET = "a set is never larger than what it is made of, nor empty here"
NO_ROOM = "fewer slots than none are refused before"
LOOKS = "how often a run tells how far it is changes nothing that it finds"
EARLIER = "when what is void is cleared changes no answer"

REASONS: dict[str, dict[str, dict[str, str]]] = {
    "allocator.py": {
        "drop": {
            "if not extra and extra.keys().isdisjoint(blocks):": ITS_WAY,
            "elif others <= 1:": COUNTED,
        },
        "take": {
            "if count <= 0:": "no count is below 0, as is asserted",
            "while source != order:  # keep the lower half, return the upper one": "it begins at the order or above, and goes down by one",
            "while source is not order:  # keep the lower half, return the upper one": ONE_OBJECT,
        },
        "replace": {"if others <= 1:": COUNTED},
        "give_back": {
            "while order != self.max_order:": "no order is above the largest",
            "while order is not self.max_order:": ONE_OBJECT,
        },
        "check_invariants": {
            'assert start % (1 << order) <= 0, f"chunk at {start} is not aligned to its size"': "no remainder is below 0"
        },
        "move_blocks": {"if count != 1:": "a block that is held is held at least once"},
    },
    "static_batching.py": {
        "simulate_static": {
            "now, first, count = -1.0, 0, len(arrivals)": "no request arrives before time 0",
            "while first != count:": "a batch ends at the last request at most",
            "while end != count and end - first < batch_size and arrivals[end] <= now:": "the end moves by one, and is at most at the last request when the loop begins",
            "while end < count and end - first != batch_size and arrivals[end] <= now:": "a batch grows by one from one, and its largest size is at least one",
        }
    },
    "baseline_manager.py": {
        "__init__": {
            "self._empty = BuddyAllocator(num_blocks, 2 << self._buddy.max_order)"
            "  # never taken from": "an empty pool in larger pieces has as many chunks of every size that is asked for"
        },
        "slots_to_ask": {
            "usual = type(num_tokens) is type(final_len) == int and max_len is None": "a type is equal only to itself",
            "usual = type(num_tokens) == type(final_len) is int and max_len is None": "a type is equal only to itself",
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
            "return all(self.num_tokens(i) != self.reservation(i).final_len for i in seq_ids)": "no sequence is longer than its final length"
        },
        "_note_full": {
            "if len(heap) >= 64 + 4 * len(self._held):"
            "  # mostly void, and no step has cleared them": EARLIER,
            "if len(heap) > 63 + 4 * len(self._held):"
            "  # mostly void, and no step has cleared them": EARLIER,
            "if len(heap) > 64 + 3 * len(self._held):"
            "  # mostly void, and no step has cleared them": EARLIER,
        },
        "check_invariants": {
            'assert len(chunks) >= len(self._held), "two sequences hold the same chunk"': "a dictionary of the reservations has at most as many entries",
            "assert r.num_blocks <= 1 << (least - 1).bit_length(), "
            '"chunk not the next power of two"': "it is a power of two and holds what was asked for, as is asserted before",
        },
        "_first_full": {
            "if self._held.get(seq_id) is held and step <= held.final_len - held.start_len:": "what was noted before an append is later than what is true since",
            "if self._held.get(seq_id) == held and step == held.final_len - held.start_len:": "a reservation is equal only to itself",
            "if self._held.get(seq_id) is held and step >= held.final_len - held.start_len:": "of what was noted of a reservation the true step is the first",
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
            "copy = table.held != 0 and self._gpu.ref_count(table.blocks[-1]) > 1": "no table withholds fewer slots than none",
            "copy = table.held > 0 and self._gpu.ref_count(table.blocks[-1]) != 1": "a block that is held is held at least once",
        },
    },
    "scheduler.py": {
        "": {
            'SWAPPED_FROM = {"auto": 2, "swap": 0}'
            "  # sequences of a group; narrower ones are recomputed": "who runs has a sequence that is not finished"
        },
        "__init__": {
            "self._widest = 0  # sequences of the largest group so far": "it is read when groups run, and none is empty",
            "self._settled = True"
            "  # until a completion or an arrival, there is nothing to decide": "before the first arrival nothing runs, which is asked for as well",
        },
        "enqueue": {
            "if len(group.seqs) >= self._widest:": "where both are equal it sets what is set"
        },
        "complete": {
            "if self._next_events and self._next_events[0] == now:": "no step goes beyond the next event"
        },
        "_make_room": {
            "while turn != len(running):": "the turn is at most behind the last",
            "if self.num_running_seqs is widest * len(running):": ITS_WAY,
            "if self.num_running_seqs >= widest * len(running):": "no group is wider than the widest",
        },
        "_await_event": {"first = seqs[ -1]  # beams are equally long": "beams are equally long"},
        "_take_events": {
            "first = seqs[ -1]  # beams are equally long: none ends before the others": "beams are equally long",
            "if group.beam_parents is not None and generated != first.output_len:": "nothing is generated beyond the output",
            "if seq.status != FINISHED:": ITSELF,
            "if seq.num_generated != seq.output_len:": "nothing is generated beyond the output",
        },
        "_place": {
            "if not queue or queue[-1].order == group.order:": ITS_WAY,
            "if not queue or queue[-1].order is group.order:": ITS_WAY,
            "if not queue or queue[-1].order <= group.order:": "where both are equal it comes last either way",
        },
    },
    "kv_cache_manager.py": {
        "blocks_for_group": {
            "if len(grown) >= len(seqs) and context % size:": "those that have grown are among them"
        },
        "require_fits": {"first = seqs[ -1]": ONE_PROMPT},
        "try_admit": {
            "if len(seqs) == 0 and group.prefix_id is None:  # most requests: no detour": ITS_WAY,
            "if len(seqs) < 1 and group.prefix_id is None:  # most requests: no detour": ITS_WAY,
            "if len(seqs) <= 1 and group.prefix_id is None:  # most requests: no detour": "no group is empty",
            "seq = seqs[ -1]": "of one sequence",
        },
        "reorder": {
            "if child != parent:": "a table is equal only to itself",
            "same = len(new) if len(new) <= len(old) else len(old)": "both are the same length then",
            "while same and old[same - 1] is not new[same - 1]:": "tables that share a block hold the same object for its number; another would only "
            "be given up and taken again",
        },
        "_swappable": {
            "if extra.get(block, 0) + 1 > count:": "a block has no fewer references than tables that hold it"
        },
    },
    "sequence.py": {
        "next_move": {
            "itself = list(range(len(self[ -1]))) if self else []": "all steps are equally wide",
            "return self._moves[index] if index != len(self._moves) else None": "bisection ends at the length at most",
        },
        "__init__": {
            "if len({seq.seq_id for seq in seqs}) != len(seqs):": SET,
            "if len({(seq.prefix_len, seq.prompt_len) for seq in seqs}) != 1:": SET,
            "if beam_parents is not None and len({seq.output_len for seq in seqs}) != 1:": SET,
        },
        "own_prompt_len": {"first = self.seqs[ -1]": ONE_PROMPT},
        "unfinished": {"return [seq for seq in self.seqs if seq.status != FINISHED]": ITSELF},
        "unfinished_ids": {
            "return [seq.seq_id for seq in self.seqs if seq.status != FINISHED]": ITSELF
        },
        "finished": {"return all(seq.status == FINISHED for seq in self.seqs)": ITSELF},
    },
    "serving.py": {
        "": {
            "EVENTS = 65  # between two looks at the clock for the progress: a power of two": LOOKS,
            "EVENTS = 63  # between two looks at the clock for the progress: a power of two": LOOKS,
        },
        "make_groups": {'if request.decoding <= "beam":': 'of the three names "beam" is the least'},
        "simulate": {
            "window_s: tuple[float, float] = ( -1.0, math.inf),": "no time is below 0",
            "now, arrived, events = arrivals[0], 0, 1": LOOKS,
            "if now < edge <= until:": "where both are equal it sets what is set",
            "if until != math.inf:": "it is at most infinity",
            "if until is not math.inf:": "infinity is always the object math.inf",
        },
        "_groups": {
            "if plain and len(plain) != len(work):": "those that are requests are among them"
        },
    },
    "beam_search.py": {
        "beam_histories": {
            "while running and steps[order[running - 1]] == step:": "who ends is left out in the step in which it ends: none ended before",
            "key=lambda index: ~steps[index])  # fmt: skip": "one less than -steps: the same order",
        },
        "beam_parents": {
            "scores = _first_scores( 2, width)": "the same search twice, with the same draws, and the first is kept",
            "parents[step] = best[ -1]": "of one search",
        },
        "_first_scores": {
            "return np.tile(np.where(np.arange(width) == 0, -1.0, -np.inf), (count, 1))": "only beam 0 has candidates, and all have its score in them: no order changes",
            "return np.tile(np.where(np.arange(width) <= 0, 0.0, -np.inf), (count, 1))": "no beam is below 0",
            "return np.tile(np.where(np.arange(width) == 0, 1.0, -np.inf), (count, 1))": "only beam 0 has candidates, and all have its score in them: no order changes",
        },
    },
    "invariants.py": {
        "check_paged": {
            'assert len(ids) <= len(set(ids)), "a sequence is in two places"': SET,
            'assert table.room <= 0 and table.phase is None, "a shared prefix may grow"': NO_ROOM,
            'assert table.room is table.held == 0, "a table in step has slots of its own"': "0 is one object in Python",
            'assert table.room <= table.held == 0, "a table in step has slots of its own"': NO_ROOM,
            'assert table.room == table.held <= 0, "a table in step has slots of its own"': NO_ROOM,
            "exclusive = m._gpu.ref_count(table.blocks[-1]) <= 1": "a block that is held is held at least once",
            "assert exclusive or writable <= 0, "
            '"a shared block could be written without a copy"': NO_ROOM,
            "filled = {block: fill for (pool, block), (_, fill, _) in fills.items() "
            'if pool >= "gpu"}': 'of the two names only "gpu" is not below it',
            "_check_ledger(m._cpu_copies, {b: f for (pool, b), (_, f, _) in fills.items() "
            'if pool <= "cpu"})': 'of the two names "cpu" is the least',
            'assert 0 <= m.duplicates() <= max(0, usage.tokens - 2), "more duplicates than tokens"': "a copy is made to be written to: with it comes a token that is no duplicate",
        },
        "_check_pool": {
            'assert len(free) <= len(set(free)), f"a {name} block is twice on the free list"': SET,
            "extra = {block: count - 1 for block, count in held.items() if count != 1}": "a block that is held is held at least once",
        },
        "_check_table": {
            'assert -1 <= table.unfilled < size, "the last block is empty or over-full"': NO_ROOM
        },
        "_check_ledger": {
            'assert node.copied < filled[block], f"more slots copied to {block} than it holds"': "a copy is made to be written to: it holds more than was copied",
            'assert node.parent is not None or node.copied <= 0, "copied from nowhere"': "fewer slots than none are never copied",
        },
    },
}
