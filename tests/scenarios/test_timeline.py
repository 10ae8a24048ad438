"""`--timeline`: what is recorded is what the manager did, and the page shows what is recorded.

The recordings are played back here by a reader of its own, written from what recorder.py says of a
frame's fields, and compared with the manager's tables after every step. The page is opened
in a headless Chromium where one is installed (CHROMIUM names another).
"""

import json
import os
import re

import pytest
import torch
from browser import Browser, find_chromium

import main
from kv_cache_manager import PagedKVCacheManager
from sequence import SequenceStatus
from vllm_sim import models
from vllm_sim.playback import timeline
from vllm_sim.playback.recorder import Recorder
from vllm_sim.reporting.files import OutputError
from vllm_sim.scenarios import mixed, sampling
from vllm_sim.scenarios import run as scenario_run
from vllm_sim.scenarios.setting import Setting
from vllm_sim.serving.scheduler import Limits
from vllm_sim.serving.simulator import Observer, make_groups, simulate
from vllm_sim.workload.requests import Request

TINY = models.Model("tiny", "opt", 2, 16, 2, 2, 8, 100, 2048)
SWAP, RECOMPUTE = mixed.RUNS[-2:]
CHROMIUM = find_chromium()
LINE = "a </script><script>alert(1)</script> setting"

pytestmark = pytest.mark.usefixtures("few_bytes")


def setting_of(num_blocks=140, block_size=16, seed=0):
    return Setting(TINY, torch.device("cpu"), 1, num_blocks, block_size, seed)


# ---- an independent reader --------------------------------------------------------------------


class Reader:
    """(blocks, tokens, GPU blocks of a prefix if swapped, else None) of every sequence."""

    def __init__(self, run):
        self.prefixes, self.held, self.status = set(run["prefixes"]), {}, {}

    def take(self, frame):
        for change in frame.get("swapped_out", ()):
            self.change(change, change["keep"])
        for seq in frame.get("gone", ()):
            del self.held[seq]
        for seq, (blocks, tokens, swapped) in self.held.items():
            if swapped is None and seq not in self.prefixes:
                self.held[seq] = (blocks, tokens + frame.get("grown", 0), None)
        for change in frame.get("changed", ()):
            self.change(change, None)
        for seq, tokens in frame.get("tokens", {}).items():
            self.held[int(seq)] = (self.held[int(seq)][0], tokens, None)
        self.status |= {int(group): status for group, status in frame.get("statuses", {}).items()}

    def change(self, change, kept):
        was, tokens, _ = self.held.get(change["sequence"], ([], 0, None))
        blocks = was[: change["keep"]] + change.get("blocks", [])
        self.held[change["sequence"]] = (blocks, tokens, kept)

    def state(self):
        return dict(self.held), dict(self.status)


def tables_of(manager, prefixes=()):
    """The same from the manager itself, private parts included."""
    found = {}
    for seq in (*prefixes, *manager._tables):
        table = manager.block_table(seq)
        found[seq] = (list(table.blocks), table.num_tokens, None)
    for seq, table in manager._swapped.items():
        found[seq] = (list(table.blocks), table.num_tokens, table.num_prefix_blocks)
    return found


class Witness(Observer):
    """Everything after every step, and who holds which block how often."""

    def __init__(self, manager, groups, prefixes):
        self.manager, self.groups, self.prefixes = manager, groups, prefixes
        self.seen, self.refs = [], []

    def look(self, key, now):
        status = {}
        for group in self.groups:
            left = group.unfinished()
            word = left[0].status.value if left else "finished"
            if word != "waiting" or group.arrival_s <= now:
                status[group.group_id] = word
        self.seen.append((key, tables_of(self.manager, self.prefixes), status))
        self.refs.append(dict(self.manager._gpu.extra_refs))

    def on_iteration(self, iteration):
        self.now, self.title = iteration.start_s, f"iteration {iteration.index}"
        self.look(self.title, self.now)

    def on_completion(self, completion):
        self.look(f"after {self.title}", self.now)


def compare(run, witness):
    """How many steps agree; AssertionError at the first that does not."""
    reader, frames = Reader(run), iter(run["frames"])
    frame = next(frames)
    for (key, tables, status), extra in zip(witness.seen, witness.refs):
        if frame is not None and frame["title"] == key:
            reader.take(frame)
            frame = next(frames, None)
        else:
            assert key.startswith("after "), f"{key} is not recorded"
        assert reader.state() == (tables, status), key
        count = {}
        for blocks, _, kept in reader.held.values():
            for block in blocks if kept is None else blocks[:kept]:
                count[block] = count.get(block, 0) + 1
        assert {b: n - 1 for b, n in count.items() if n > 1} == extra
    assert frame is None
    return len(witness.seen)


def served(preemption, num_blocks=60, block_size=4, seed=0, prefix_len=10, cpu=30):
    """(recording, witness, result) of a small mix that is preempted a lot."""
    manager = PagedKVCacheManager(num_blocks, block_size, num_cpu_blocks=cpu, watermark=0.02)
    manager.allocate_prefix(0, prefix_len)
    kinds = (
        {},
        {"num_samples": 3},
        {"beam_width": 3},
        {"prefix_len": prefix_len},
        {"prefix_len": prefix_len, "num_samples": 2},
    )
    requests = [
        Request(i, 1.3 * i, 5 + (7 * i + seed) % 23, 6 + (5 * i) % 31, **kinds[(i + seed) % 5])
        for i in range(25)
    ]
    groups = make_groups(requests, first_seq_id=1, prefix_ids={prefix_len: 0}, seed=seed)
    witness = Witness(manager, groups, (0,))
    recorder = Recorder("a run", "small", manager, groups, (0,))
    observers = [witness, recorder]
    result = simulate(groups, manager, Limits(200, 40), preemption=preemption, observers=observers)
    return recorder.recording(), witness, result


def events_of(run, kind):
    events = (event for frame in run["frames"] for event in frame.get("events", ()))
    return [event for event in events if event["kind"] == kind]


def json_of(recording):
    return json.loads(json.dumps(recording.to_json()))


@pytest.mark.parametrize("preemption", ["swap", "recompute", "auto"])
@pytest.mark.parametrize("shape", [(60, 4, 10, 30), (120, 2, 7, 60), (48, 5, 10, 9)])
def test_the_recording_is_what_the_manager_did(preemption, shape):
    blocks, size, prefix, cpu = shape
    for seed in range(3):
        recording, witness, result = served(preemption, blocks, size, seed, prefix, cpu)
        run = json_of(recording)
        assert compare(run, witness) == 2 * result.num_iterations
        assert result.num_swaps + result.num_recomputations > 3
        swaps, back = events_of(run, "swap_out"), events_of(run, "swap_in")
        assert len(swaps) == result.num_swaps
        assert len(events_of(run, "recompute")) == result.num_recomputations
        assert sum(e["num_blocks"] for e in swaps) == result.blocks_swapped_out
        assert sum(e["num_blocks"] for e in back) == result.blocks_swapped_in
        copies = events_of(run, "copy")
        assert len(copies) == result.num_copies > 10
        assert len(events_of(run, "finish")) == len(events_of(run, "arrive")) == 25
        assert len(events_of(run, "admit")) == 25 + result.num_recomputations
        assert events_of(run, "move") and events_of(run, "block")
        again = [event for event in events_of(run, "admit") if event["again"]]
        assert len(again) == result.num_recomputations
        assert recording.preemptions() == sorted(recording.preemptions())


def test_copies_and_new_blocks_name_whose_they_are():
    run = json_of(served("swap")[0])
    reader = Reader(run)
    for frame in run["frames"]:
        reader.take(frame)
        for event in frame.get("events", ()):
            if event["kind"] == "copy":
                assert event["block"] in reader.held[event["sequence"]][0]
                assert event["source"] != event["block"]
            elif event["kind"] == "block":
                assert reader.held[event["sequence"]][0][event["index"]] == event["block"]


@pytest.mark.parametrize("field", ["swapped_out", "gone", "grown", "changed", "tokens", "statuses"])
def test_a_field_that_is_missing_is_noticed(field):
    recording, witness, _ = served("swap")
    run = json_of(recording)
    frame = next(frame for frame in run["frames"][20:] if field in frame)
    del frame[field]
    with pytest.raises((AssertionError, KeyError)):
        compare(run, witness)


@pytest.mark.parametrize("kind", [SWAP, RECOMPUTE])
def test_scenario_4_is_recorded_as_it_runs(kind, monkeypatch):
    """With the scenario's own observers and requests; its manager is seen through the recorder."""
    setting, witnesses = setting_of(), []
    serve = mixed.simulate

    def simulate_seen(groups, manager, *rest, observers, **options):
        witnesses.append(Witness(manager, groups, (0,)))
        return serve(groups, manager, *rest, observers=[*observers, witnesses[-1]], **options)

    longest = mixed.longest_of(setting)
    requests = mixed.under_pressure(setting, longest)
    monkeypatch.setattr(mixed, "simulate", simulate_seen)
    outcome = mixed.serve(setting, kind, requests, longest, None)
    recording = outcome.recording
    assert compare(json_of(recording), witnesses[0]) == 2 * outcome.result.num_iterations
    assert recording.name.endswith(kind.name) and recording.preemptions() != []


def test_scenario_3_is_recorded_step_by_step(monkeypatch):
    monkeypatch.setattr(sampling, "OUTPUT_LEN", 20)
    seen = {}
    step = Recorder.step

    def watched(self, *args, **options):
        step(self, *args, **options)
        seen.setdefault(self.name, []).append(tables_of(self.manager))

    monkeypatch.setattr(Recorder, "step", watched)
    samples = sampling.figure_8(setting_of()), sampling.one_prompt(setting_of())[4]
    figure, four = (json_of(one.recording) for one in samples)
    for run in (figure, four):
        reader = Reader(run)
        states = []
        for frame in run["frames"]:
            reader.take(frame)
            states.append(dict(reader.held))
        assert states == seen[run["name"]]
    assert figure["frames"][-1]["title"] == "sample 2 writes its token 8"
    assert events_of(figure, "copy") == [{"kind": "copy", "sequence": 0, "source": 1, "block": 3}]
    assert len(four["frames"]) == 1 + 3 + 4 * 20 and len(events_of(four, "copy")) == 3
    assert four["groups"][0]["seqs"] == [0, 1, 2, 3]


# ---- the page ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(path of the page, its recordings): Fig. 8, and a run of each kind of preemption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "OUTPUT_LEN", 20)
        patch.setattr(sampling, "SAMPLES", (4,))
        samples = sampling.figure_8(setting_of()), sampling.one_prompt(setting_of())[4]
    recordings = [one.recording for one in samples]
    recordings += [served(kind)[0] for kind in ("swap", "recompute")]
    path = tmp_path_factory.mktemp("page") / "run.html"
    timeline.write(path, LINE, recordings)
    return path, [json_of(recording) for recording in recordings]


def test_the_page_is_one_file_that_asks_for_nothing(written):
    path, runs = written
    text = path.read_bytes().decode("ascii")
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", text)
    assert "default-src 'none'" in text and "/* data */" not in text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    found = json.loads(data)
    assert found["format"] == 2 and found["runs"] == runs and found["setting"] == LINE
    assert text.count("<script") == 4 == text.count("</script>")


def test_a_page_of_the_default_size_stays_small():
    """A tenth of the blocks; the data grows in proportion."""
    setting = setting_of()
    longest = mixed.longest_of(setting)
    requests = mixed.mix(setting, longest, 1.0)
    recordings = [
        mixed.serve(setting, kind, requests, longest, None).recording for kind in (SWAP, RECOMPUTE)
    ]
    frames = sum(len(recording.frames) for recording in recordings)
    assert len(timeline.page(LINE, recordings)) < 45_000 + 400 * frames


def test_refused_before_anything_runs(monkeypatch, tmp_path, refused):
    monkeypatch.setattr(scenario_run, "run_one", lambda *_: pytest.fail("ran"))
    monkeypatch.chdir(tmp_path)
    base = ["--model", "opt-125m", "--device", "cpu", "--timeline"]
    (tmp_path / "folder").mkdir()
    for more, told in (
        (["run.html", "--scenario", "1", "--scenario", "2"], "--timeline shows scenarios 3 and 4"),
        (["run.html", "--num-blocks", "5000"], "5,000 blocks are too many to watch"),
        (["folder"], "cannot write folder: it is a directory"),
        (["none/run.html"], "there is no directory none"),
        (["a.html", "--json", "./a.html"], "--timeline and --json are the same file, a.html"),
    ):
        assert told in refused(main, *base, *more)
        assert os.listdir(tmp_path) == ["folder"]


def test_a_failed_write_leaves_the_old_page(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "run.html"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        timeline.write(path, LINE, [])
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["run.html"]


# ---- in a browser -----------------------------------------------------------------------------

CELLS = """Object.fromEntries([...document.querySelectorAll('#POOL .cell')]
  .filter(c => c.dataset.seqs)
  .map(c => [c.dataset.block, [c.dataset.seqs.split(',').map(Number).sort(),
    +c.dataset.filled]]))"""
QUEUES = """Object.fromEntries([...document.querySelectorAll('[data-queue]')].map(
  q => [q.dataset.queue, q.dataset.groups ? q.dataset.groups.split(',').map(Number) : []]))"""

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


@pytest.fixture(scope="module")
def browser():
    with Browser(CHROMIUM) as found:
        yield found


def expected(run, step, pool):
    """Block -> [who holds it, slots filled], as the cells of a grid should say."""
    reader = Reader(run)
    for frame in run["frames"][: step + 1]:
        reader.take(frame)
    cells = {}
    for seq, (blocks, tokens, kept) in reader.held.items():
        for index, block in enumerate(blocks):
            here = "gpu" if kept is None or index < kept else "cpu"
            if here == pool:
                filled = min(run["block_size"], tokens - index * run["block_size"])
                cells.setdefault(str(block), [[], filled])[0].append(seq)
    lists = {status.value: [] for status in SequenceStatus}
    for group in run["groups"]:
        if group["id"] in reader.status:
            lists[reader.status[group["id"]]].append(group["id"])
    return {block: [sorted(s, key=str), n] for block, (s, n) in cells.items()}, lists


def check_shown(page, run, step):
    for pool in ("gpu", "cpu"):
        cells, lists = expected(run, step, pool)
        assert page.run(CELLS.replace("POOL", pool)) == cells, (step, pool)
    if len(run["groups"]) > 1:
        assert page.run(QUEUES) == lists, step


@needs_chromium
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_every_step_shows_what_was_recorded(browser, written, number):
    path, runs = written
    page, run = browser.open(path, f"#run={number}"), runs[number]
    last = len(run["frames"]) - 1
    steps = [0, *range(1, last, max(1, last // 25)), last]
    for step in [*steps, *reversed(steps[::3])]:  # there and back
        page.run(f"goto({step})")
        check_shown(page, run, step)
    assert page.errors == [] and page.requested == [path.as_uri()]


@needs_chromium
def test_any_fragment_opens_a_run_and_none_the_one_with_most_to_see(browser, written):
    """A run that is not there is as none; a step that is not there, the nearest."""
    path, runs = written
    last = len(runs[1]["frames"]) - 1
    kinds = [{e["kind"] for f in run["frames"] for e in f.get("events", ())} for run in runs]
    most = max(range(4), key=lambda number: len(kinds[number]))
    assert most == 2, "the run that swaps"
    page = browser.open(path)
    bad = "", "run", "run=", "run=-1", "run=4", "run=0.5", "run=length", "%", "&&=", "run=x&step=x"
    steps = {"": 0, "7": 7, "6.7": 7, "-3": 0, "x": 0, "9999": last, "Infinity": last}
    asked = ((f"run=1&step={text}", 1, step) for text, step in steps.items())
    for fragment, number, step in (*((one, most, 0) for one in bad), *asked):
        page.ask("Page.navigate", url="about:blank")
        page.ask("Page.navigate", url=f"{path.as_uri()}#{fragment}")
        page.wait("document.readyState === 'complete' && location.protocol === 'file:'")
        assert page.run("+document.getElementById('run').value") == number, fragment
        check_shown(page, runs[number], step)
        assert page.run("+document.documentElement.dataset.step") == step, fragment
    page.run("location.hash = '#run=0&step=2'")
    page.wait("document.getElementById('run').value === '0'")
    check_shown(page, runs[0], 2)
    assert page.errors == []


@needs_chromium
def test_the_page_plays_to_its_end(browser, written):
    path, runs = written
    page, last = browser.open(path, "#run=2"), len(runs[2]["frames"]) - 1
    page.run("document.getElementById('speed').value = 60; play()")
    assert page.run("document.getElementById('play').textContent") == "Pause"
    page.wait(f"document.documentElement.dataset.step == {last} && timer === null")
    assert page.run("document.getElementById('play').textContent") == "Play"
    check_shown(page, runs[2], last)
    assert page.run("document.querySelectorAll('#gpu .cell:not(.free)').length") > 0  # the prefix
    assert page.errors == []


@needs_chromium
def test_keys_step_and_jump(browser, written):
    path, runs = written
    page, frames = browser.open(path, "#run=2"), runs[2]["frames"]

    def steps(*kinds):
        return [
            i for i, f in enumerate(frames) if any(e["kind"] in kinds for e in f.get("events", ()))
        ]

    def at():
        return int(page.run("document.documentElement.dataset.step"))

    copies, preempted = steps("copy"), steps("swap_out", "recompute")
    for wanted in [step for step in copies if step > 0][:3]:
        page.press("c", "KeyC")
        assert at() == wanted
        drawn = len([e for e in frames[wanted]["events"] if e["kind"] == "copy"])
        assert page.run("document.querySelectorAll('#copies path').length") == 2 * drawn
    page.press("Home")
    for wanted in preempted[:3]:
        page.press("p", "KeyP")
        assert at() == wanted
    page.press("P", "KeyP", modifiers=8)
    assert at() == preempted[1]
    page.press("ArrowRight")
    assert at() == preempted[1] + 1
    page.press("ArrowLeft")
    assert at() == preempted[1]
    page.press("End")
    assert at() == len(frames) - 1
    page.press("p", "KeyP")
    assert "no preemption after" in page.run("document.getElementById('status').textContent")
    page.press(" ", "Space")  # plays from the start, and pauses
    page.wait("+document.documentElement.dataset.step < 20 && timer !== null")
    page.press(" ", "Space")
    assert page.run("timer === null")
    assert page.errors == []


@needs_chromium
def test_a_block_and_a_request_tell_what_they_are(browser, written):
    path, runs = written
    page, run = browser.open(path, "#run=2"), runs[2]
    reader = Reader(run)
    for step in range(len(run["frames"])):
        reader.take(run["frames"][step])
        counts = {}
        for blocks, _, kept in reader.held.values():
            for block in blocks if kept is None else ():
                counts[block] = counts.get(block, 0) + 1
        shared = [b for b, n in counts.items() if n == 3]
        if shared:
            break
    page.run(f"goto({step}); document.querySelectorAll('#gpu .cell')[{shared[0]}].click()")
    told = page.run("document.getElementById('inspector').innerText")
    assert "reference count 3" in told and "logical block" in told
    assert page.run("document.getElementById('what').textContent") == f"Block {shared[0]}"
    group = next(g for g in run["groups"] if g["seqs"][0] in reader.held and len(g["seqs"]) == 3)
    page.press("Escape")
    page.run(f"document.querySelector('.chip[data-group=\"{group['id']}\"]').click()")
    seq = group["seqs"][0]
    table = page.run(f"document.querySelector('[data-table=\"{seq}\"]').textContent")
    blocks, tokens, _ = reader.held[seq]
    filled = [min(run["block_size"], tokens - i * run["block_size"]) for i in range(len(blocks))]
    assert table.endswith(": " + ", ".join(f"{b} ({n})" for b, n in zip(blocks, filled)))
    mine = page.run("[...document.querySelectorAll('#gpu .mine')].map(c => +c.dataset.block)")
    held = {b for s in group["seqs"] for b in reader.held[s][0]}
    assert set(mine) == held
    unnamed = "[...document.querySelectorAll('button, select, input')].filter(e => !(e.ariaLabel"
    unnamed += " || e.textContent.trim() || e.closest('label'))).length"
    assert page.run(unnamed) == 0, "a control without a name"
    assert page.errors == []


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_light_and_dark(browser, written, dark):
    """WCAG's 4.5 between text and what is behind it, for the page and for every block's label."""
    path, _ = written
    page = browser.open(path, "#run=2&step=60", dark)
    page.run("""
      window.luminance = (text) => {
        const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
          .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      window.contrast = (a, b) => {
        const [x, y] = [luminance(a), luminance(b)].sort();
        return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
      };
      window.resolved = (colour) => {
        const probe = make('span'); probe.style.color = colour; document.body.append(probe);
        const found = getComputedStyle(probe).color; probe.remove(); return found;
      };""")
    page.run("window.body = getComputedStyle(document.body)")
    assert page.run("contrast(body.color, body.backgroundColor)") > 7
    assert (page.run("luminance(body.backgroundColor)") < 0.1) == dark
    for soft in ("header p", "#status", "#log span", ".none"):
        code = f"contrast(getComputedStyle(document.querySelector('{soft}')).color,"
        code += " body.backgroundColor)"
        assert page.run(code) > 4.5, soft
    worst = page.run("""Math.min(...[...owners.values()].map(
      (o) => contrast(resolved(o.own), 'rgb(16, 17, 20)')))""")
    assert worst > 4.5
