// The page: two grids of blocks, the queues and the events; controls.js has the rest.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const PREEMPTIONS = ["swap_out", "recompute"];
const STATES = {
  running: "Running", waiting: "Waiting", swapped: "Swapped out", finished: "Finished",
};
const LOG_LENGTH = 120;
let replay, owners, groups, alone; // of the run that is shown
let step = 0, timer = null, picked = null, cells = {}, drawn = {};

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (name === "own") node.style.setProperty("--own", value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const hue = (number) => `hsl(${Math.round(number * 137.508) % 360} 65% 76%)`;
const nameOf = (seq) => owners.get(seq).name;
const groupOf = (seq) => owners.get(seq).group;
const plural = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;
const requestName = (group) => (alone ? "prompt A" : `request ${groups.get(group).name}`);

// ---- a run ------------------------------------------------------------------------------------

function show(index) {
  pause();
  replay = new Replay(data.runs[index]);
  const run = replay.run;
  alone = run.groups.length === 1;
  groups = new Map(run.groups.map((group) => [group.id, group]));
  owners = new Map(run.prefixes.map((seq) => [seq, { name: "P", group: null, own: "#c9c9c9" }]));
  run.groups.forEach((group, number) => group.seqs.forEach((seq, i) => {
    const several = group.seqs.length > 1;
    const name = alone ? `${group.name}${i + 1}` : several ? `${group.name}.${i + 1}` : group.name;
    owners.set(seq, { name, group: group.id, own: hue(alone ? i : number) });
  }));
  element("about").textContent = `${run.about}.`;
  element("slider").max = replay.length - 1;
  element("cpu-part").hidden = run.num_cpu_blocks === 0;
  cells = { gpu: build("gpu", run.num_blocks), cpu: build("cpu", run.num_cpu_blocks) };
  drawn = { gpu: new Array(run.num_blocks), cpu: new Array(run.num_cpu_blocks) };
  const ns = "http://www.w3.org/2000/svg";
  const copies = document.createElementNS(ns, "svg");
  copies.id = "copies";
  element("gpu").append(copies);
  picked = null;
  step = 0; // the last one may be past the end of this run
  zoom();
  overview();
  goto(0);
}

function build(pool, count) {
  const here = element(pool);
  here.replaceChildren();
  const made = [];
  for (let block = 0; block < count; block++) {
    const cell = make("button", {
      type: "button", class: "cell free", "data-block": block, "data-pool": pool,
      tabindex: block ? -1 : 0,
    });
    made.push(cell);
  }
  here.append(...made);
  return made;
}

function zoom() {
  const chosen = element("zoom").value;
  const size = chosen === "fit" ? fitting() : Number(chosen);
  document.documentElement.style.setProperty("--cell", `${size}px`);
  for (const id of ["gpu", "cpu"]) {
    element(id).classList.toggle("tight", size < 26);
    element(id).classList.toggle("numbered", size >= 40);
  }
  if (replay) arrows();
}

// The size at which both pools fit the window, within reason.
function fitting() {
  const count = replay.run.num_blocks + replay.run.num_cpu_blocks;
  const wide = element("pools").clientWidth;
  const high = window.innerHeight - element("gpu").getBoundingClientRect().top - window.scrollY - 60;
  const size = Math.floor(Math.sqrt((wide * Math.max(200, high)) / count) * 0.97) - 2;
  return Math.max(19, Math.min(56, size));
}

function overview() {
  const total = replay.run.num_blocks, n = replay.length, width = 1000, height = 46;
  const x = (i) => (n > 1 ? (i * width) / (n - 1) : 0).toFixed(1);
  const y = (used) => (height - 6 - (used / total) * (height - 13)).toFixed(1);
  const area = replay.used.map((used, i) => `L${x(i)},${y(used)}`).join("");
  const marks = (kinds, cls, top) => replay.run.frames.map((frame, i) =>
    (frame.events || []).some((event) => kinds.includes(event.kind))
      ? `<rect class="${cls}" x="${x(i) - 1}" y="${top}" width="2" height="6"/>` : "").join("");
  const chart = element("chart");
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  chart.innerHTML = `<path class="used" d="M0,${height - 6}${area}L${width},${height - 6}Z"/>` +
    marks(PREEMPTIONS, "preempt", 0) + marks(["copy"], "copy", height - 6) +
    `<line class="now" y1="0" y2="${height}"/>`;
}

// ---- a step -----------------------------------------------------------------------------------

function goto(index) {
  step = Math.max(0, Math.min(replay.length - 1, Math.round(index) || 0));
  const state = replay.at(step);
  const before = step ? replay.at(step - 1) : { tables: new Map(), status: new Map() };
  for (const pool of ["gpu", "cpu"]) {
    const now = replay.pool(state, pool === "cpu"), old = replay.pool(before, pool === "cpu");
    cells[pool].forEach((cell, block) => paint(cell, pool, block, now.get(block), old.has(block)));
    const slots = [...now.values()].reduce((sum, holders) => sum + holders[0].filled, 0);
    const padding = now.size * replay.run.block_size - slots;
    const shared = [...now.values()].filter((holders) => holders.length > 1).length;
    element(`${pool}-count`).textContent =
      `${now.size} of ${plural(cells[pool].length, "block")} used, ${shared} shared, ` +
      `${plural(padding, "slot")} of padding`;
    cells[pool].now = now;
  }
  element("slider").value = step;
  const text = title(step);
  element("slider").setAttribute("aria-valuetext", text);
  const line = element("chart").querySelector(".now");
  const at = replay.length > 1 ? (step * 1000) / (replay.length - 1) : 0;
  line.setAttribute("x1", at);
  line.setAttribute("x2", at);
  element("status").replaceChildren(make("b", {}, text), " ",
    `step ${step + 1} of ${replay.length}. ${brief(told(replay.run.frames[step]))}`);
  queues(state);
  log();
  arrows();
  inspect(picked);
  document.documentElement.dataset.step = step;
}

const title = (index) => replay.run.frames[index].title;

function paint(cell, pool, block, holders, wasUsed) {
  const flags = `${holders && !wasUsed ? "taken" : ""}${!holders && wasUsed ? "freed" : ""}`;
  const seen = holders
    ? `${holders.map((h) => h.seq).join()}:${holders[0].filled}:${flags}` : flags;
  if (drawn[pool][block] === seen) return;
  drawn[pool][block] = seen;
  cell.className = `cell ${holders ? "" : "free"} ${flags}`;
  const about = `${pool === "cpu" ? "CPU block" : "block"} ${block}`;
  if (!holders) {
    cell.replaceChildren();
    cell.setAttribute("aria-label", `${about}, free`);
    cell.dataset.refs = 0;
    delete cell.dataset.seqs;
    return;
  }
  const { seq, filled } = holders[0], size = replay.run.block_size, refs = holders.length;
  const group = groupOf(seq);
  const owner = group === null ? "P" : alone ? (refs > 1 ? "A" : nameOf(seq)) : groups.get(group).name;
  cell.style.setProperty("--own", alone && refs > 1 ? "#c9c9c9" : owners.get(seq).own);
  cell.style.setProperty("--fill", `${(100 * filled) / size}%`);
  cell.classList.toggle("shared", refs > 1);
  cell.replaceChildren(make("b", {}, owner), ...(refs > 1 ? [make("i", {}, String(refs))] : []));
  cell.dataset.refs = refs;
  cell.dataset.seqs = holders.map((h) => h.seq).join();
  cell.dataset.filled = filled;
  const whose = group === null ? "shared prefix" : requestName(group);
  const sharing = refs > 1 ? `, held by ${refs}` : "";
  cell.setAttribute("aria-label", `${about}, ${whose}${sharing}, ${filled} of ${size} slots`);
}

function arrows() {
  const copies = (replay.run.frames[step].events || []).filter((event) => event.kind === "copy");
  const middle = (block) => {
    const cell = cells.gpu[block];
    return [cell.offsetLeft + cell.offsetWidth / 2, cell.offsetTop + cell.offsetHeight / 2];
  };
  element("copies").innerHTML = copies.slice(0, 40).map(({ source, block }) => {
    const [x1, y1] = middle(source), [x2, y2] = middle(block);
    const length = Math.hypot(x2 - x1, y2 - y1) || 1;
    const [dx, dy] = [(x2 - x1) / length, (y2 - y1) / length];
    const head = `M${x2 - 11 * dx - 6 * dy},${y2 - 11 * dy + 6 * dx}L${x2},${y2}` +
      `L${x2 - 11 * dx + 6 * dy},${y2 - 11 * dy - 6 * dx}`;
    const bend = Math.min(30, length / 4);
    const line = `M${x1},${y1}Q${(x1 + x2) / 2 + bend * dy},${(y1 + y2) / 2 - bend * dx} ${x2},${y2}`;
    return `<path class="under" d="${line}${head}"/><path d="${line}${head}"/>`;
  }).join("");
}

function queues(state) {
  const lists = { running: [], waiting: [], swapped: [], finished: [] };
  for (const group of replay.run.groups) {
    const status = state.status.get(group.id) || (alone ? "running" : null);
    if (status) lists[status].push(group);
  }
  element("queues").replaceChildren(...Object.entries(lists).flatMap(([status, found]) => {
    const chips = found.map((group) => {
      const own = alone ? "#c9c9c9" : owners.get(group.seqs[0]).own;
      const chip = make("button", {
        type: "button", class: "chip", own, "data-group": group.id,
        "aria-pressed": picked?.group === group.id, "aria-label": `request ${group.name}`,
        onclick: () => pick({ group: group.id }),
      }, group.name);
      return chip;
    });
    if (alone && status !== "running") return [];
    if (status === "finished") chips.length = 0;
    return [make("h3", {}, `${STATES[status]}: ${found.length}`),
      make("div", { class: "chips", "data-queue": status,
        "data-groups": found.map((group) => group.id).join() },
      ...(chips.length || status === "finished" ? chips : [make("span", { class: "none" }, "none")]))];
  }));
}

// ---- events -----------------------------------------------------------------------------------

function told(frame) {
  const lines = [], blocks = [];
  const tell = {
    arrive: (e) => `${requestName(e.group)} arrives`,
    admit: (e) => `${requestName(e.group)} is admitted${e.again ? " again" : ""}`,
    swap_out: (e) => `preempted: ${requestName(e.group)} is swapped out, ${plural(e.num_blocks, "block")}`,
    recompute: (e) => `preempted: ${requestName(e.group)} is freed, to be recomputed`,
    swap_in: (e) => `${requestName(e.group)} is swapped in, ${plural(e.num_blocks, "block")}`,
    prefix: () => "the shared prefix is stored",
    fork: (e) => `${nameOf(e.sequence)} shares all blocks of ${nameOf(e.parent)}`,
    copy: (e) => `copy-on-write: block ${e.source} to ${e.block} for ${nameOf(e.sequence)}`,
    move: (e) => `beam ${nameOf(e.sequence)} goes on from ${nameOf(e.parent)}`,
    finish: (e) => `${requestName(e.group)} is finished`,
  };
  for (const event of frame.events || []) {
    if (event.kind === "block") blocks.push(`${nameOf(event.sequence)} (block ${event.block})`);
    else lines.push(tell[event.kind](event));
  }
  if (blocks.length && element("appends").checked) {
    const more = blocks.length > 4 ? ` and ${blocks.length - 4} more` : "";
    lines.push(`new block: ${blocks.slice(0, 4).join(", ")}${more}`);
  }
  return lines;
}

// Two of the lines, what people wait for before the rest.
function brief(lines) {
  const rare = lines.filter((line) => /^(copy|preempted)/.test(line));
  const ordered = [...rare, ...lines.filter((line) => !rare.includes(line))];
  const more = ordered.length > 2 ? `; and ${ordered.length - 2} more` : "";
  return ordered.slice(0, 2).join("; ") + more;
}

function log() {
  const items = [];
  for (let i = step; i >= 0 && items.length < LOG_LENGTH; i--) {
    for (const line of told(replay.run.frames[i])) {
      const kind = line.startsWith("copy") ? "copy" : line.startsWith("preempted") ? "preempt" : "";
      const when = replay.run.frames[i].iteration ?? i + 1;
      items.push(make("li", i === step ? { class: "now" } : {},
        make("button", { type: "button", class: "when", "aria-label": `go to step ${i + 1}`,
          onclick: () => { pause(); goto(i); } }, String(when)),
        make("span", kind ? { class: kind } : {}, line.replace("copy-on-write", "on write"))));
    }
  }
  element("log").replaceChildren(...items);
}
