// The recording as it was: which tables hold which blocks at a step. No rule of the manager is
// here; recording.py says what the letters of a frame mean.
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
    for (const [seq, kept, blocks] of frame.o || []) {
      const old = tables.get(seq);
      tables.set(seq, {
        blocks: old.blocks.slice(0, kept).concat(blocks), tokens: old.tokens, kept, swapped: true,
      });
    }
    for (const seq of frame.x || []) tables.delete(seq);
    if (frame.a) {
      for (const [seq, table] of tables) {
        if (!table.swapped && !this.prefixes.has(seq)) table.tokens += 1;
      }
    }
    for (const [seq, keep, blocks] of frame.d || []) {
      const old = tables.get(seq) || { blocks: [], tokens: 0 };
      tables.set(seq, {
        blocks: old.blocks.slice(0, keep).concat(blocks), tokens: old.tokens, kept: 0, swapped: false,
      });
    }
    for (const [seq, tokens] of frame.n || []) tables.get(seq).tokens = tokens;
    for (const [group, status] of frame.g || []) state.status.set(group, status);
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

  // The step of the next event with one of these names, or of the one before; null if none.
  find(names, from, way) {
    for (let i = from + way; i >= 0 && i < this.length; i += way) {
      if ((this.run.frames[i].e || []).some((event) => names.includes(event[0]))) return i;
    }
    return null;
  }
}
