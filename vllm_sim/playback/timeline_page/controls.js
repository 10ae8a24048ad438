// What is pointed at, the buttons and the keys; then the page starts.
"use strict";

// ---- what is pointed at -----------------------------------------------------------------------

function pick(what) {
  picked = JSON.stringify(what) === JSON.stringify(picked) ? null : what;
  goto(step);
}

function inspect(what) {
  const box = element("inspector"), gpu = cells.gpu.now, cpu = cells.cpu.now;
  const mine = new Set();
  if (!what) {
    element("what").textContent = "Block or request";
    box.replaceChildren(make("p", { class: "none" },
      "Point at a block, or click a block or a request to keep it here."));
  } else if (what.block !== undefined) {
    const holders = (what.pool === "cpu" ? cpu : gpu).get(what.block) || [];
    element("what").textContent = `${what.pool === "cpu" ? "CPU block" : "Block"} ${what.block}`;
    const size = replay.run.block_size;
    const lines = holders.length
      ? [`${holders[0].filled} of ${plural(size, "slot")} filled, ${size - holders[0].filled} padding`,
        `reference count ${holders.length}${holders.length > 1 ? ": a write copies it first" : ""}`]
      : ["free"];
    box.replaceChildren(...lines.map((line) => make("p", {}, line)));
    if (holders.length) {
      const rows = holders.map((h) => make("tr", {}, make("td", {}, sequenceButton(h.seq)),
        make("td", {}, `logical block ${h.index}`)));
      box.append(make("table", {}, make("tr", {}, make("th", {}, "sequence"), make("th", {}, "is its")), ...rows));
    }
  } else {
    const state = replay.at(step);
    const seqs = what.seq !== undefined ? [what.seq] : groups.get(what.group).seqs;
    const group = what.seq !== undefined ? groupOf(what.seq) : what.group;
    element("what").textContent = what.seq !== undefined && group !== null
      ? `Sequence ${nameOf(what.seq)}` : group === null ? "Shared prefix" : `Request ${groups.get(group).name}`;
    const about = group === null ? null : groups.get(group);
    const kinds = { single: "one sequence", parallel: "parallel sampling", beam: "beam search", prefix: "behind the shared prefix" };
    box.replaceChildren(...(about ? [make("p", {}, kinds[about.kind] +
      (about.prompt ? `, ${plural(about.prompt, "token")} of prompt, ${about.output} of output` : ""))] : []));
    for (const seq of seqs) {
      const table = state.tables.get(seq);
      box.append(make("p", { class: "seq" }, sequenceButton(seq),
        table ? ` ${plural(table.tokens, "token")} in ${plural(table.blocks.length, "block")}${table.swapped ? ", on the CPU" : ""}` : " holds no block"));
      if (!table) continue;
      const size = replay.run.block_size;
      const entries = table.blocks.map((block, index) => {
        const there = table.swapped && index >= table.kept ? "cpu" : "gpu";
        mine.add(`${there}${block}`);
        return `${block} (${Math.min(size, table.tokens - index * size)})`;
      });
      box.append(make("p", { class: "small", "data-table": seq }, `block table, filled slots: ${entries.join(", ")}`));
    }
  }
  for (const pool of ["gpu", "cpu"]) {
    element(pool).classList.toggle("picked", mine.size > 0);
    if (mine.size) cells[pool].forEach((cell, block) => cell.classList.toggle("mine", mine.has(pool + block)));
  }
}

function sequenceButton(seq) {
  return make("button", { type: "button", class: "chip", own: owners.get(seq).own,
    onclick: () => pick({ seq }) }, nameOf(seq));
}

// ---- controls ---------------------------------------------------------------------------------

function pause() {
  clearInterval(timer);
  timer = null;
  element("play").textContent = "Play";
}

function play() {
  if (timer !== null) return pause();
  if (step === replay.length - 1) goto(0);
  element("play").textContent = "Pause";
  const forward = () => { if (step < replay.length - 1) goto(step + 1); else pause(); };
  timer = setInterval(forward, 1000 / Number(element("speed").value));
}

function jump(names, way) {
  pause();
  const found = replay.find(names, step, way);
  if (found === null) {
    const what = names[0] === "copy" ? "copy-on-write" : "preemption";
    element("status").replaceChildren(make("b", {}, title(step)), " ", `no ${what} ${way > 0 ? "after" : "before"} this step`);
  } else goto(found);
}

function faster(by) {
  const speed = element("speed");
  speed.selectedIndex = Math.max(0, Math.min(speed.options.length - 1, speed.selectedIndex + by));
  if (timer !== null) { pause(); play(); }
}

function moveInGrid(cell, key) {
  const all = cells[cell.dataset.pool], at = Number(cell.dataset.block);
  const columns = all.findIndex((other, i) => i && other.offsetTop > all[0].offsetTop);
  const across = columns < 0 ? all.length : columns;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[key];
  const next = all[at + by];
  if (!next) return;
  cell.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

const actions = {
  first: () => { pause(); goto(0); }, back: () => { pause(); goto(step - 1); }, play,
  forward: () => { pause(); goto(step + 1); }, last: () => { pause(); goto(replay.length - 1); },
  "copy-before": () => jump(["copy"], -1), "copy-next": () => jump(["copy"], 1),
  "preempt-before": () => jump(PREEMPTIONS, -1), "preempt-next": () => jump(PREEMPTIONS, 1),
};
for (const [id, action] of Object.entries(actions)) element(id).addEventListener("click", action);
element("slider").addEventListener("input", () => { pause(); goto(Number(element("slider").value)); });
element("run").addEventListener("change", () => show(Number(element("run").value)));
element("zoom").addEventListener("change", zoom);
element("speed").addEventListener("change", () => faster(0));
element("appends").addEventListener("change", () => goto(step));
element("overview").addEventListener("click", (event) => {
  const box = element("chart").getBoundingClientRect();
  pause();
  goto(Math.round(((event.clientX - box.left) / box.width) * (replay.length - 1)));
});
window.addEventListener("resize", zoom);
for (const pool of ["gpu", "cpu"]) {
  const at = (event) => {
    const cell = event.target.closest(".cell");
    return cell && { pool, block: Number(cell.dataset.block) };
  };
  element(pool).addEventListener("mouseover", (event) => { if (!picked && at(event)) inspect(at(event)); });
  element(pool).addEventListener("focusin", (event) => { if (!picked && at(event)) inspect(at(event)); });
  element(pool).addEventListener("mouseleave", () => inspect(picked));
  element(pool).addEventListener("click", (event) => { if (at(event)) pick(at(event)); });
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const here = event.target, cell = here.closest?.(".cell");
  if (here.matches?.("select, input[type=range]") && event.key !== "Escape") return;
  const key = event.key.toLowerCase();
  if (cell && key.startsWith("arrow")) moveInGrid(cell, event.key);
  else if (key === " " && !here.matches?.("button:not(.cell), input")) play();
  else if (key === "arrowleft") actions.back();
  else if (key === "arrowright") actions.forward();
  else if (key === "home") actions.first();
  else if (key === "end") actions.last();
  else if (key === "c") jump(["copy"], event.shiftKey ? -1 : 1);
  else if (key === "p") jump(PREEMPTIONS, event.shiftKey ? -1 : 1);
  else if (key === "+" || key === "=") faster(1);
  else if (key === "-") faster(-1);
  else if (key === "escape") { picked = null; goto(step); } else return;
  event.preventDefault();
});

data.runs.forEach((run, index) => element("run").append(make("option", { value: index }, run.name)));
// How many kinds of things happen in a run.
const variety = (run) => new Set(run.frames.flatMap((frame) => (frame.events || []).map((event) => event.kind))).size;

// #run=2&step=184 opens there; where no such run is named, the one in which most kinds of things happen.
function open() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const all = data.runs.map(variety), asked = Number(wanted.get("run") || NaN);
  const index = data.runs[asked] ? asked : all.indexOf(Math.max(...all));
  element("run").value = index;
  show(index);
  goto(Number(wanted.get("step")));
}

if (data.runs.length) {
  open();
  window.addEventListener("hashchange", open);
} else element("about").textContent = "Nothing was recorded.";
