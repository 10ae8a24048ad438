// The recording as it was: which tables hold which blocks at a step. No rule of the manager is
// here; recorder.py says what the fields of a frame mean. Empty ones are not there.
"use strict";

const EVERY = 64; // frames between two states that are kept

class Replay {
  constructor(run) {
    this.run = run;
    this.prefixes = new Set(run.prefixes);
    this.kept = [];
    const state = { tables: new Map(), status: new Map() };
    this.used = [];
    run.frames.forEach((frame, index) => {
      this.apply(state, frame);
      if (index % EVERY === 0) this.kept.push(Replay.copy(state));
      this.used.push(this.pool(state, false).size);
    });
  }

  get length() {
    return this.run.frames.length;
  }

  static copy(state) {
    const tables = new Map();
    for (const [seq, table] of state.tables) tables.set(seq, { ...table });
    return { tables, status: new Map(state.status) };
  }

  // The state at a step; the caller's to keep.
  at(index) {
    const from = Math.floor(index / EVERY);
    const state = Replay.copy(this.kept[from]);
    for (let i = from * EVERY + 1; i <= index; i++) this.apply(state, this.run.frames[i]);
    return state;
  }

  apply(state, frame) {
    const tables = state.tables;
    const change = ({ sequence, keep, blocks }, swapped) => {
      const old = tables.get(sequence) || { blocks: [], tokens: 0 };
      tables.set(sequence, {
        blocks: old.blocks.slice(0, keep).concat(blocks || []), tokens: old.tokens,
        kept: swapped ? keep : 0, swapped,
      });
    };
    const numbered = (found) => Object.entries(found || {}).map(([key, value]) => [Number(key), value]);
    for (const one of frame.swapped_out || []) change(one, true);
    for (const sequence of frame.gone || []) tables.delete(sequence);
    for (const [sequence, table] of tables) {
      if (!table.swapped && !this.prefixes.has(sequence)) table.tokens += frame.grown || 0;
    }
    for (const one of frame.changed || []) change(one, false);
    for (const [sequence, tokens] of numbered(frame.tokens)) tables.get(sequence).tokens = tokens;
    for (const [group, status] of numbered(frame.statuses)) state.status.set(group, status);
  }

  // Block -> [{seq, index, filled}] of the GPU's pool or the CPU's.
  pool(state, cpu) {
    const size = this.run.block_size;
    const found = new Map();
    for (const [seq, table] of state.tables) {
      const first = cpu ? (table.swapped ? table.kept : table.blocks.length) : 0;
      const end = !cpu && table.swapped ? table.kept : table.blocks.length;
      for (let index = first; index < end; index++) {
        const filled = Math.min(size, table.tokens - index * size);
        const block = table.blocks[index];
        const there = found.get(block);
        if (there) there.push({ seq, index, filled });
        else found.set(block, [{ seq, index, filled }]);
      }
    }
    return found;
  }

  // The step of the next event of one of these kinds, or of the one before; null if none.
  find(kinds, from, way) {
    for (let i = from + way; i >= 0 && i < this.length; i += way) {
      if ((this.run.frames[i].events || []).some((event) => kinds.includes(event.kind))) return i;
    }
    return null;
  }
}
