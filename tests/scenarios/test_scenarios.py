"""The four scenarios on a tiny model: their checks hold, and each check can fail.

Every check that main.py prints is met here at least once by something that is broken on purpose:
a check that nothing can make fail would tell a reader nothing. Few iterations and small pools, so
that a scenario takes a fraction of a second; the bookkeeping is that of the full size.
"""

import dataclasses
import functools
import gc
import random

import pytest
import torch

import paged_attention
from kv_cache_manager import BaselineCacheManager, PagedKVCacheManager
from paged_attention import PagedKVCache
from vllm_sim import models, paper
from vllm_sim.reporting.tables import Table
from vllm_sim.scenarios import baseline, mixed, paged, sampling
from vllm_sim.scenarios.report import Pool, render_scenario
from vllm_sim.scenarios.setting import Setting, check_setting, sample_requests
from vllm_sim.scenarios.stamped_cache import StampedCache
from vllm_sim.serving import systems
from vllm_sim.serving.simulator import Observer, make_groups
from vllm_sim.workload.length_tables import ALPACA, SHAREGPT
from vllm_sim.workload.requests import Request

TINY = models.Model("tiny", "opt", 2, 16, 2, 2, 8, 100, 2048)
SHORT = models.Model("short", "opt", 2, 16, 2, 2, 8, 100, 256)
GROUPED = models.Model("grouped", "opt", 3, 32, 4, 2, 8, 100, 2048)
SCENARIOS = (baseline, paged, sampling, mixed)
MANAGERS = (BaselineCacheManager, PagedKVCacheManager)


pytestmark = pytest.mark.usefixtures("few_bytes")


@pytest.fixture
def quick(monkeypatch):
    """Shorter steady states; the full length is for the numbers beside the paper's."""
    for module, warmup, iterations in (
        (baseline, 100, 900),
        (paged, 300, 300),
        (sampling, 50, 60),
    ):
        monkeypatch.setattr(module, "WARMUP", warmup)
        for name in ("ITERATIONS", "BASELINE_ITERATIONS"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, iterations)
    monkeypatch.setattr(sampling, "OUTPUT_LEN", 20)
    return monkeypatch


def setting_of(num_blocks, block_size=16, seed=0, model=TINY, num_layers=1):
    return Setting(model, torch.device("cpu"), num_layers, num_blocks, block_size, seed)


def shown(module, setting):
    return module.report(module.run(setting))


@functools.cache
def right(module, setting):
    """What a scenario measures where nothing is broken; ask for it while nothing is."""
    return module.run(setting)


def failed(report):
    return [check.name for check in report.checks if not check.ok]


def records(report, title):
    """The rows of the one table whose title starts so."""
    (table,) = (p for p in report.parts if isinstance(p, Table) and p.title.startswith(title))
    return table.records()


# --- all checks hold -----------------------------------------------------------------------------

NUM_CHECKS = {1: {5}, 2: {5, 6}, 3: {5}, 4: {6}}


def assert_all_hold(report):
    assert failed(report) == [], [check for check in report.checks if not check.ok]
    names = [check.name for check in report.checks]
    assert len(set(names)) == len(names) in NUM_CHECKS[report.number]
    assert report.answer.endswith(".") and "nan" not in report.answer
    text = render_scenario(report, "plain")
    assert text.isascii() and max(map(len, text.split("\n"))) <= 100
    tables = report.tables_json()
    for name, row in ((name, row) for t in tables for name in t["index"][:1] for row in t["rows"]):
        assert f"{row[name]} " in text, "no name is broken for that"
    negative = any(row["saving"] < 0 for row in tables[-1]["rows"] if report.number == 4)
    assert negative == ("A saving below 0: the shared prefix of" in text)


@pytest.mark.parametrize("module", SCENARIOS)
@pytest.mark.parametrize(
    "setting",
    [
        setting_of(130, seed=1),  # the fewest blocks of the default size
        setting_of(200, seed=2, model=GROUPED, num_layers=2),
        setting_of(12, 300, seed=0),  # a block for each sequence of a group, and one more
        setting_of(2069, 1, seed=4),
        setting_of(40, 64, seed=3),
    ],
    ids=lambda s: f"{s.num_blocks}x{s.block_size}",
)
def test_all_checks_hold(module, setting, quick):
    check_setting(setting)
    report = shown(module, setting)
    assert_all_hold(report)
    assert {check.name for check in report.checks} <= names_that_can_fail()


# Each of these made a check fail, or a scenario stop with a traceback, although nothing was wrong.
ONCE_FAILED = [
    (sampling, setting_of(983, seed=3)),  # a mean over few requests, which fell
    (sampling, setting_of(603, seed=0)),
    (sampling, setting_of(122, 128)),
    (baseline, setting_of(130, seed=3)),  # one largest chunk: nothing to fragment
    (baseline, setting_of(13, 2048)),  # a block holds the longest request
]


@pytest.mark.parametrize(
    ("module", "setting"),
    [pytest.param(m, s, marks=[pytest.mark.slow] * (s.num_blocks > 200)) for m, s in ONCE_FAILED],
)
def test_no_check_fails_where_nothing_is_wrong(module, setting):
    assert_all_hold(shown(module, setting))


def test_the_same_setting_gives_the_same_report(quick):
    for module in (baseline, mixed):
        first, again = (shown(module, setting_of(130, seed=5)) for _ in range(2))
        assert first.tables_json() == again.tables_json() and first.answer == again.answer
    other, report = (shown(baseline, setting_of(130, seed=seed)) for seed in (6, 0))
    assert other.answer != report.answer


@pytest.mark.parametrize("module", SCENARIOS)
def test_what_is_measured_is_plain_data(module, quick):
    """Nothing of the run lives on in it; and the report that is made of it is always the same."""
    found = right(module, setting_of(130, seed=1))
    seen, left = set(), [found]
    while left:
        one = left.pop()
        if id(one) not in seen and not isinstance(one, type):
            seen.add(id(one))
            assert not isinstance(one, (torch.Tensor, PagedKVCache, Observer, *MANAGERS)), one
            left += gc.get_referents(one)
    assert len(seen) > 1000 and module.report(found) == module.report(found)
    with pytest.raises(dataclasses.FrozenInstanceError):
        module.report(found).answer = ""


# --- the setting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_size", "need"),
    [
        (16, 130),  # 128 of the request, one to grow into, one of the watermark
        (1, 2069),
        (7, 512),  # a chunk of a power of two: 293 blocks are not enough
        (128, 17),
        (256, 12),  # 9 for the longest request; six sequences have two blocks each
        (2048, 12),
        (5000, 12),
    ],
)
def test_the_fewest_blocks_are_accepted_and_one_less_is_not(block_size, need):
    check_setting(setting_of(need, block_size))
    for more in range(need, need + 400):
        check_setting(setting_of(more, block_size))
    for fewer in (need - 1, need // 2, 1):
        with pytest.raises(ValueError, match=f"raise --num-blocks to {need:,} or more") as caught:
            check_setting(setting_of(fewer, block_size))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("block_size", "need"), [(16, 130), (7, 512), (256, 12)])
def test_what_is_accepted_holds_the_longest_request_and_the_largest_group(block_size, need):
    """Under every policy, alone, to the end; and with a pool one smaller it is at times refused."""
    setting = setting_of(need, block_size)
    longest = Request(0, 0.0, 2000, 48)
    for policy in ("max", "pow2", "oracle"):
        manager = BaselineCacheManager(need, block_size, policy=policy, max_len=2048)
        manager.allocate(0, longest.prompt_len, 2048)
    manager = PagedKVCacheManager(need, block_size, watermark=paper.WATERMARK)
    group = make_groups([longest])[0]
    manager.require_fits(group)
    for n in (1, 2, 4, 6):
        for request in sample_requests(SHAREGPT, 300, setting, n):
            assert request.num_samples == n
            assert request.prompt_len + request.output_len <= setting.max_len
            manager.require_fits(make_groups([request])[0])


def test_a_pool_that_does_not_fit_the_memory_is_refused():
    from paged_attention import DeviceMemoryError

    with pytest.raises(DeviceMemoryError):
        check_setting(setting_of(10**10))


def test_a_setting_describes_itself():
    setting = setting_of(300, 8, seed=7, model=GROUPED, num_layers=2)
    told = setting.describe()
    assert (told["heads"], told["kv_heads"], told["head_size"], told["layers"]) == (4, 2, 8, 2)
    assert (told["num_blocks"], told["block_size"], told["seed"]) == (300, 8, 7)
    assert told["dtype"] == "float32" and told["device"] == "cpu" and told["max_len"] == 2048
    assert setting.line == "grouped, 300 blocks of 8 = 2,400 slots, seed 7"
    assert setting.pool_bytes() == 2400 * 2 * 2 * 2 * 8 * 4
    assert setting.new_cache().num_bytes == setting.pool_bytes()
    assert Setting(SHORT, torch.device("cpu"), 1, 40, 16, 0).max_len == 256
    assert Setting(SHORT, torch.device("cuda"), 1, 40, 16, 0).dtype is torch.float16


# --- scenario 1 ----------------------------------------------------------------------------------


def test_fifty_tokens_in_a_reservation_of_2048(quick):
    found = right(baseline, setting_of(130, seed=1))
    report = baseline.report(found)
    assert (
        "50 tokens under 'max': 2048 slots reserved, 1998 of them never used (97.6 %)"
        in (report.parts[0])
    )
    assert report.checks[0].name == "50 tokens in a 2048-slot reservation" and report.checks[0].ok
    setting = setting_of(16, model=SHORT)
    one = {"setting": setting, "one_request": baseline.one_request(setting)}
    short, *_ = baseline.checks(dataclasses.replace(found, **one))
    assert short.name == "50 tokens in a 256-slot reservation" and short.ok


def test_figure_3_slot_by_slot(quick):
    report = baseline.report(right(baseline, setting_of(130, seed=1)))
    rows = [tuple(row.values()) for row in records(report, "Fig. 3")]
    # Counted in the figure: prompt and current token, two (one) to come, and the rest.
    assert rows == [
        ("A", 2048, "ours", 8, 2, 2038),
        ("A", 2048, "paper", 8, 2, 2038),
        ("B", 512, "ours", 4, 1, 507),
        ("B", 512, "paper", 4, 1, 507),
    ]
    assert report.checks[1].ok


def test_the_shares_of_the_contiguous_policies(quick):
    """Beside each other as in Fig. 2: what each policy wastes, and what it cannot waste."""
    report = shown(baseline, setting_of(300))
    rows = [row for row in records(report, "Steady state") if row["who"] == "ours"]
    policies = {row["policy"]: row for row in rows}
    for row in rows:
        parts = ("tokens", "reserved", "internal", "rounding", "free")
        assert sum(row[part] for part in parts) == pytest.approx(100)
        external = row["rounding"] + row["free"]
        assert row["external_and_others"] == pytest.approx(external)
    assert policies[paper.ORCA_ORACLE]["internal"] == 0 < policies[paper.ORCA_POW2]["internal"]
    assert policies[paper.ORCA_MAX]["rounding"] == 0  # 2048 is a power of two
    tokens = [policies[s]["tokens"] for s in baseline.CONTIGUOUS.values()]
    assert tokens == sorted(tokens) and tokens[0] < tokens[-1]
    fill = records(report, "Admitted in order")
    for row in fill:
        parts = ("tokens", "reserved", "internal", "rounding", "free")
        assert sum(row[part] for part in parts) == 300 * 16


def test_the_map_of_the_pool_shows_each_slot_where_it_is():
    manager = BaselineCacheManager(20, 4, policy="pow2", max_len=32)
    manager.allocate(0, 9, 21)  # 9 tokens, 12 to come, 4 never used, 7 rounded up: 32 slots
    manager.allocate(1, 20, 32)  # 20 tokens, 12 to come
    # 16 slots a character: what most of them are. Chunks are given from the upper end.
    assert (manager.start_slot(1), manager.start_slot(0)) == (0, 32)
    pool = Pool("pow2", 4, baseline.pool_spans(manager))
    assert baseline.pool_map(pool, 20) == "Tr" + "To" + "."


def test_a_request_pool_that_nothing_fills_is_an_error():
    requests = [Request(n, 0.0, 3, 3) for n in range(2)]
    with pytest.raises(ValueError, match="all 2 requests fit"):
        baseline.first_fill(setting_of(130), requests)


def test_requests_that_fit_all_at_once_are_an_error_in_scenario_2():
    """No steady state, and no first refusal to show: it is not told as one."""
    with pytest.raises(ValueError, match="the queue of 2 ran dry"):
        paged.fill_and_run(setting_of(130), [Request(n, 0.0, 3, 3) for n in range(2)])


# --- scenario 3: closed forms --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_size", "prompt_len"), [(1, 9), (4, 7), (4, 8), (4, 9), (16, 161), (16, 160), (64, 5)]
)
def test_n_samples_cost_what_a_count_by_hand_says(block_size, prompt_len, monkeypatch):
    """In sets of (sample, position) and without a block table: what may be shared is what was
    written before the fork, and a block is shared only if all of it was."""
    output_len = 20
    monkeypatch.setattr(sampling, "OUTPUT_LEN", output_len)
    for n in (1, 2, 3, 6):
        manager = PagedKVCacheManager(n * (prompt_len + output_len), block_size)
        samples = sampling.SharedPrompt(setting_of(1), manager, prompt_len, "name", "about")
        for sample in range(1, n):
            samples.fork(sample)
        copied = sum(samples.generate(s) for _ in range(output_len) for s in range(n))
        blocks = set()
        for sample in range(n):
            for position in range(prompt_len + output_len):
                block = position // block_size
                shared = (block + 1) * block_size <= prompt_len
                blocks.add((0 if shared else sample, block))
        usage = samples.manager.usage()
        assert usage.physical_blocks == len(blocks)
        assert copied == (n - 1) * (prompt_len % block_size > 0)
        assert usage.logical_tokens == n * (prompt_len + output_len)
        assert all(samples.holds(sample) for sample in range(n))


def test_figure_8_as_drawn():
    found = sampling.figure_8(setting_of(1))
    assert found.rows == [
        ("prompt shared", "7(4) 1(3)", "7(4) 1(3)", 2),
        ("A1 writes: copy, then write", "7(4) 3(4)", "7(4) 1(3)", 1),
        ("A2 writes in place", "7(4) 3(4)", "7(4) 1(4)", 1),
    ]
    assert (found.copies, found.in_place, found.intact) == (1, True, True)


def test_the_prompt_is_cut_to_a_short_model(monkeypatch):
    monkeypatch.setattr(sampling, "OUTPUT_LEN", 120)
    setting = setting_of(16, model=SHORT)
    found = sampling.one_prompt(setting)
    assert sampling.prompt_len_of(setting) == 136 < sampling.prompt_len_of(setting_of(130))
    for n, samples in found.items():
        counts = samples.copies, samples.usage.physical_blocks, samples.usage.logical_blocks
        assert counts == sampling.closed_form(setting, n) and samples.intact


# --- broken on purpose ---------------------------------------------------------------------------


def no_reservation(mp):
    mp.setattr(
        BaselineCacheManager, "slots_to_ask", lambda self, tokens, final, max_len=None: final
    )


def never_a_hole(mp):
    mp.setattr(BaselineCacheManager, "refused_by_fragmentation", lambda self, *lengths: False)


def a_token_misplaced(mp):
    """Sums that still add up, with one reserved slot taken for a token."""

    class Counts(BaselineCacheManager):
        def usage(self):
            usage = super().usage()
            one = min(1, usage.reserved)
            return dataclasses.replace(
                usage,
                tokens=usage.tokens + one,
                reserved=usage.reserved - one,
                logical_tokens=usage.logical_tokens + one,
            )

    mp.setattr(systems, "BaselineCacheManager", Counts)


def a_token_forgotten(mp):
    """A paged manager that believes its sequences to be shorter than they are."""

    class Counts(PagedKVCacheManager):
        def usage(self):
            usage = super().usage()
            return dataclasses.replace(usage, logical_tokens=max(0, usage.logical_tokens - 1))

        def check_invariants(self):
            """It would notice."""

    mp.setattr(systems, "PagedKVCacheManager", Counts)


def coarse_blocks(mp):
    """Pages of four times the size that the setting says."""

    new = Setting.new_manager

    def larger(self, policy, **options):
        if policy != "paged":
            return new(self, policy)
        coarse = {"num_blocks": self.num_blocks // 4 + 2, "block_size": self.block_size * 4}
        return new(dataclasses.replace(self, **coarse), policy, watermark=0.0)

    mp.setattr(Setting, "new_manager", larger)


def kernel(mp, wrong):
    """paged_attention_kernel as scenario 2 sees it, with wrong(q, k, v, tables, lens) instead."""
    right = paged_attention.paged_attention_kernel
    mp.setattr(paged_attention, "paged_attention_kernel", lambda *args: right(*wrong(*args)))


def a_token_dropped(mp):
    kernel(mp, lambda q, k, v, tables, lens: (q, k, v, tables, (lens - 1).clamp(min=1)))


def padding_not_masked(mp):
    def whole(q, k, v, tables, lens):
        return q, k, v, tables, torch.full_like(lens, tables.shape[1] * k.shape[1])

    kernel(mp, whole)


def blocks_out_of_order(mp):
    """Attention does not mind the order of its tokens, until the last block has unfilled slots."""
    kernel(mp, lambda q, k, v, tables, lens: (q, k, v, tables.flip(1), lens))


def one_k_for_v(mp):
    kernel(mp, lambda q, k, v, tables, lens: (q, k, k, tables, lens))


def rounded_otherwise(mp):
    """Right to the last bit but one: within any budget, and not identical."""
    right = paged_attention.paged_attention_kernel

    def in_double(q, k, v, tables, lens):
        out, lse = right(q.double(), k.double(), v.double(), tables, lens)
        return out.float(), lse.float()

    mp.setattr(paged_attention, "paged_attention_kernel", in_double)


def both_scaled_wrongly(mp):
    """Paged and contiguous agree with one another, and with nothing else."""
    ours, dense = paged_attention.paged_attention_kernel, paged.attention
    mp.setattr(paged_attention, "paged_attention_kernel", lambda *a: ours(*a, scale=0.5))
    mp.setattr(paged, "attention", lambda *a: dense(*a, scale=0.5))


def a_slot_off(mp):
    """Every token is written one slot further on than the table says."""
    right = paged.slot_mapping

    def next_slot(table, start, count, size, device="cpu"):
        return (right(table, start, count, size, device) + 1) % (130 * 16)

    mp.setattr(paged, "slot_mapping", next_slot)


def a_byte_forgotten(mp):
    size = Setting.pool_bytes
    mp.setattr(Setting, "pool_bytes", lambda self: size(self) - 1)


def a_layer_too_many(mp):
    new = Setting.new_cache

    def larger(self, **options):
        return new(Setting(self.model, self.device, 2, self.num_blocks, self.block_size, 0))

    mp.setattr(Setting, "new_cache", larger)


def no_copy_on_write(mp):
    mp.setattr(PagedKVCacheManager, "_tails", property(lambda m: {}, lambda *_: None), False)
    mp.setattr(PagedKVCacheManager, "check_invariants", lambda self: None)


def copies_not_made(mp):
    mp.setattr(PagedKVCache, "copy_blocks", lambda self, pairs: None)


def copies_too_late(mp):
    """Made, but when the write that asked for them has been: it is overwritten."""
    copy, write = PagedKVCache.copy_blocks, PagedKVCache.write

    def later(self, pairs):
        self.pending = pairs

    def write_then_copy(self, layer, slots, k, v):
        write(self, layer, slots, k, v)
        copy(self, self.__dict__.pop("pending", ()))

    mp.setattr(PagedKVCache, "copy_blocks", later)
    mp.setattr(PagedKVCache, "write", write_then_copy)


def copies_for_all(mp):
    """The last holder copies as well, instead of writing in place."""
    append = PagedKVCacheManager.append

    def always(self, seq_id):
        self.fork(seq_id, 99)
        copies = append(self, seq_id)
        self.free(99)
        return copies

    mp.setattr(PagedKVCacheManager, "append", always)


def prompts_not_shared(mp):
    """The second sample gets a prompt of its own wherever there is room for it."""
    admit = PagedKVCacheManager.admit

    def apart(self, group):
        copies = admit(self, group)
        first, second, *_ = (seq.seq_id for seq in group.unfinished())
        if self.can_allocate(self.num_tokens(first)):
            self.free(second)
            self.allocate(second, self.num_tokens(first))
        return copies

    mp.setattr(PagedKVCacheManager, "admit", apart)


def contiguous_copies_not_made(mp):
    mp.setattr(StampedCache, "_copy_slots", lambda self, copies: None)


def never_room_to_swap(mp):
    mp.setattr(PagedKVCacheManager, "can_swap_out", lambda self, ids: False)


def no_pressure(mp):
    mp.setattr(mixed, "LOADS", (0.01,))
    mp.setattr(mixed, "MAX_OUTPUT", 4)
    mp.setattr(mixed, "num_cpu_blocks", lambda setting: 4)


def a_request_lost(mp):
    serve = mixed.simulate
    mp.setattr(mixed, "simulate", lambda groups, *rest, **more: serve(groups[:-1], *rest, **more))


def recomputed_blocks_not_rewritten(mp):
    prefill = StampedCache._prefill

    def once(self, group):
        known = group.seqs[0].seq_id in self.tokens
        writes = prefill(self, group)
        return [] if known else writes

    mp.setattr(StampedCache, "_prefill", once)


def swapped_to_the_wrong_place(mp):
    move = PagedKVCache.swap_in

    def turned(self, pairs):
        sources = [source for source, _ in pairs]
        move(self, [*zip(sources[1:] + sources[:1], (target for _, target in pairs))])

    mp.setattr(PagedKVCache, "swap_in", turned)


# Parts of what is measured: the field, and how it is.
ONE_REQUEST = {"one_request": baseline.one_request}
FIGURE_3 = {"figure_3": lambda s: baseline.figure_3()}
STATES = {"steady_states": lambda s: baseline.steady_states(s, sample_requests(SHAREGPT, 2000, s))}
STEADY = {"steady": lambda s: paged.fill_and_run(s, sample_requests(SHAREGPT, 2000, s))[0]}
FIGURE_8 = {"figure_8": sampling.figure_8}
ONE_PROMPT = {"one_prompt": sampling.one_prompt}
FIGURE_15 = {"figure_15": sampling.figure_15}
FIG_8 = "Fig. 8: exactly one block copied, both samples intact"
CLOSED = "copies and blocks equal their closed forms"
INTACT = "every sample's K and V intact through its table"
IDENTICAL = "paged attention bit-identical to contiguous"
BUDGET = "within the error budget of dense float64"
SAVED = "the blocks saved are the prompts' own"
OWN = "every finished sequence holds its own K and V"
BREAKS = [
    # (what is broken, the scenario, the parts that are measured so or {} for all of it,
    # the checks that must fail: no more and no less)
    (no_reservation, baseline, ONE_REQUEST, {"50 tokens in a 2048-slot reservation"}),
    (no_reservation, baseline, FIGURE_3, {"Fig. 3's slots"}),
    (
        never_a_hole,
        baseline,
        {},
        {"external fragmentation under pow2", "external fragmentation under oracle"},
    ),
    (
        a_token_misplaced,
        baseline,
        STATES,
        {"slot identity at every iteration"},
    ),
    (
        a_token_forgotten,
        paged,
        STEADY,
        {"slots add up at every iteration"},
    ),
    (
        coarse_blocks,
        paged,
        STEADY,
        {"padding under one block per sequence", "waste of allocated memory under 4 %"},
    ),
    (a_token_dropped, paged, {}, {IDENTICAL, BUDGET}),
    (padding_not_masked, paged, {}, {IDENTICAL, BUDGET}),
    (blocks_out_of_order, paged, {}, {IDENTICAL, BUDGET}),
    (one_k_for_v, paged, {}, {IDENTICAL, BUDGET}),
    (a_slot_off, paged, {}, {IDENTICAL, BUDGET}),
    (rounded_otherwise, paged, {}, {IDENTICAL}),
    (both_scaled_wrongly, paged, {}, {BUDGET}),
    (a_byte_forgotten, paged, {}, {"predicted bytes are the tensors' bytes"}),
    (a_layer_too_many, paged, {}, {"predicted bytes are the tensors' bytes"}),
    (no_copy_on_write, sampling, FIGURE_8, {FIG_8}),
    (copies_not_made, sampling, FIGURE_8, {FIG_8}),
    (copies_too_late, sampling, FIGURE_8, {FIG_8}),
    (copies_for_all, sampling, FIGURE_8, {FIG_8}),
    (no_copy_on_write, sampling, ONE_PROMPT, {CLOSED, INTACT}),
    (copies_not_made, sampling, ONE_PROMPT, {INTACT}),
    (copies_too_late, sampling, ONE_PROMPT, {INTACT}),
    (prompts_not_shared, sampling, FIGURE_15, {f"Alpaca: {SAVED}", f"ShareGPT: {SAVED}"}),
    (copies_not_made, mixed, {}, {f"paged, swap: {OWN}", f"paged, recompute: {OWN}"}),
    (swapped_to_the_wrong_place, mixed, {}, {f"paged, swap: {OWN}"}),
    # With swapping too: where the CPU pool is full, it falls back to recomputation.
    (
        recomputed_blocks_not_rewritten,
        mixed,
        {},
        {f"paged, swap: {OWN}", f"paged, recompute: {OWN}"},
    ),
    (contiguous_copies_not_made, mixed, {}, {f"Orca (Oracle): {OWN}"}),
    (never_room_to_swap, mixed, {}, {"memory pressure forced preemption by swapping"}),
    (
        no_pressure,
        mixed,
        {},
        {
            "memory pressure forced preemption by swapping",
            "memory pressure forced preemption by recomputation",
        },
    ),
]


def names_that_can_fail():
    """Checks that something broken below makes fail: every check there is must be among them."""
    seen = {name for *_, checks in BREAKS for name in checks}
    return seen | {"all groups finished in every run"}


@pytest.mark.parametrize(
    ("broken", "module", "parts", "checks"),
    BREAKS,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_broken_fails_its_check(broken, module, parts, checks, quick):
    """A part that is measured wrongly stands among others that are right."""
    setting = setting_of(300 if broken in (never_a_hole, coarse_blocks) else 130, seed=1)
    others = right(module, setting) if parts else None
    broken(quick)
    measured = {field: measure(setting) for field, measure in parts.items()}
    found = dataclasses.replace(others, **measured) if parts else module.run(setting)
    assert set(failed(module.report(found))) == checks


def test_a_request_that_is_lost_is_missed(quick):
    a_request_lost(quick)
    lost = failed(shown(mixed, setting_of(130, seed=1)))
    assert "all groups finished in every run" in lost


def test_slots_that_do_not_add_up_stop_scenario_1(quick):
    """The identity is asserted in every iteration: here a failure is an error, not a row."""
    append_all = BaselineCacheManager.append_all

    def forgets_one(self, num_tokens=1):
        copies = append_all(self, num_tokens)
        self._asked += 1
        return copies

    quick.setattr(BaselineCacheManager, "append_all", forgets_one)
    with pytest.raises(AssertionError, match=r"slot identity broken|sum of slots"):
        baseline.run(setting_of(130))


# --- scenario 4's workload -----------------------------------------------------------------------


def test_the_mix_fits_every_policy_and_has_every_kind():
    rng = random.Random(0)
    for _ in range(20):
        setting = setting_of(rng.randint(130, 600), 16, rng.randrange(1000))
        longest = mixed.longest_of(setting)
        requests = mixed.mix(setting, longest, rng.choice(mixed.LOADS))
        kinds = [(r.decoding, r.prefix_len > 0) for r in requests]
        assert set(kinds) == {
            ("single", False),
            ("parallel", False),
            ("beam", False),
            ("single", True),
        }
        assert [r.request_id for r in requests] == list(range(len(requests)))
        arrivals = [r.arrival_s for r in requests]
        assert arrivals == sorted(arrivals)
        for r in requests:
            assert r.output_len >= 2 and r.prefix_len + r.prompt_len + r.output_len <= longest


def test_a_run_of_fewer_iterations_than_rows_has_a_row_for_each():
    setting = setting_of(130)
    requests = [Request(n, 0.0, 20, 4, prefix_len=16 * (n == 2)) for n in range(3)]
    outcome = mixed.serve(setting, mixed.PAGED_SWAP, requests, 500, None)
    rows = [*mixed.tables(mixed.Found(setting, requests, [outcome]))][1].records()
    assert [row["iterations"] for row in rows] == ["0-0", "1-1", "2-2", "3-3"]
    assert [row["batch"] for row in rows] == [3.0] * 4
    tokens = [100 * (16 + 3 * n) / setting.num_slots for n in (20, 21, 22, 23)]
    assert [row["tokens"] for row in rows] == pytest.approx(tokens)


def test_the_requests_of_the_steady_states_are_cut_to_the_pool():
    for n in (1, 2, 6):
        setting = setting_of(130, model=SHORT)
        requests = sample_requests(ALPACA, 500, setting, n)
        totals = [r.prompt_len + r.output_len for r in requests]
        assert max(totals) <= 256 and min(r.output_len for r in requests) >= 1
        assert requests == sample_requests(ALPACA, 500, setting, n)
