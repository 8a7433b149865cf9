// The table of sandboxes: sorted, filtered, and changed in place.

import { make, put, Sparkline } from "./dom.js";
import { age, bytes, processors, rate, time } from "./format.js";
import { matches } from "./model.js";

const text = (one, other) => one.localeCompare(other, undefined, { numeric: true, sensitivity: "base" });

/** Key, heading, what is compared, and whether a first click shows the largest first. */
export const COLUMNS = [
  { key: "name", title: "Sandbox", of: (row) => row.title },
  { key: "state", title: "State", of: (row) => row.weight, largest: true },
  { key: "age", title: "Age", of: (row) => (row.created === null ? null : row.at - row.created), number: true },
  { key: "cpu", title: "CPU", of: (row) => row.rates.cpu, number: true, largest: true },
  { key: "memory", title: "Memory", of: (row) => row.memory.used, number: true, largest: true },
  { key: "overhead", title: "Overhead", of: (row) => row.memory.overhead, number: true, largest: true },
  { key: "returned", title: "Given back", of: (row) => row.memory.returned, number: true, largest: true },
  { key: "network", title: "Network in / out", of: (row) => total(row.rates.received, row.rates.sent), number: true, largest: true },
  { key: "disk", title: "Disk read / written", of: (row) => total(row.rates.read, row.rates.written), number: true, largest: true },
];

const total = (one, other) => (one === null && other === null ? null : (one ?? 0) + (other ?? 0));
const pair = (one, other) => (one === null && other === null ? "–" : `${rate(one ?? 0)} / ${rate(other ?? 0)}`);

class Row {
  constructor(open) {
    this.title = make("button", { type: "button", class: "name", onclick: () => open(this.id) });
    this.subtitle = make("span", { class: "note" });
    this.badge = make("span", { class: "badge" });
    this.trouble = make("span", { class: "note trouble" });
    this.cpu = make("span");
    this.memory = make("span");
    this.cpuLine = new Sparkline("CPU");
    this.memoryLine = new Sparkline("Memory");
    this.cells = new Map(COLUMNS.map(({ key, title, number }) => [
      key, make(key === "name" ? "th" : "td", { scope: key === "name" ? "row" : null, class: number ? "number" : null, "data-title": title }),
    ]));
    this.cells.get("name").append(this.title, this.subtitle);
    this.cells.get("state").append(this.badge, this.trouble);
    this.cells.get("cpu").append(this.cpu, this.cpuLine.element);
    this.cells.get("memory").append(this.memory, this.memoryLine.element);
    this.element = make("tr", {}, ...this.cells.values());
    this.element.addEventListener("click", (event) => {
      if (!event.target.closest("button") && !String(getSelection())) open(this.id);
    });
  }

  show(row) {
    this.id = row.id;
    put(this.title, row.title);
    put(this.subtitle, row.subtitle);
    put(this.badge, row.status);
    this.badge.dataset.weight = row.weight;
    put(this.trouble, row.troubles.length && row.weight > 1 ? row.troubles[0][1] : "");
    const passed = this.cells.get("age");
    put(passed, row.created === null ? "–" : age(row.at - row.created));
    passed.title = row.created === null ? "" : time(row.created);
    put(this.cpu, processors(row.rates.cpu));
    this.cpuLine.redraw(row.history.map((one) => one.cpu), row.state.vcpus || 1, processors(row.rates.cpu));
    const limit = row.containers.reduce((sum, one) => sum + (one.memory_limit_bytes || 0), 0);
    put(this.memory, bytes(row.memory.used));
    this.memory.title = limit ? `limit ${bytes(limit)}` : "";
    this.memoryLine.redraw(row.history.map((one) => one.memory), limit || row.memory.total || 1, bytes(row.memory.used));
    put(this.cells.get("overhead"), bytes(row.memory.overhead));
    put(this.cells.get("returned"), bytes(row.memory.returned));
    put(this.cells.get("network"), pair(row.rates.received, row.rates.sent));
    put(this.cells.get("disk"), pair(row.rates.read, row.rates.written));
  }
}

export class Table {
  constructor(body, open) {
    this.body = body;
    this.open = open;
    this.rows = new Map();
  }

  /** Show the rows of a model that a view wants. Returns how many. */
  show(model, view) {
    const words = view.filter.toLowerCase().split(/\s+/).filter(Boolean);
    const column = COLUMNS.find(({ key }) => key === view.sort) ?? COLUMNS[1];
    const chosen = [...model.rows.values()].filter((row) =>
      matches(row, words) &&
      (view.show !== "trouble" || row.weight > 1) &&
      (view.show !== "pods" || row.state.cri || row.containers.length > 1));
    const sign = view.descending ? -1 : 1;
    chosen.sort((one, other) => {
      const [mine, theirs] = [column.of(one), column.of(other)];
      if (mine !== theirs) {
        if (mine === null) return 1; // what is not known comes last either way
        if (theirs === null) return -1;
        const order = typeof mine === "string" ? text(mine, theirs) : mine - theirs;
        if (order) return sign * order;
      }
      return text(one.title, other.title) || text(one.id, other.id);
    });
    const kept = new Map();
    chosen.forEach((row, index) => {
      const shown = this.rows.get(row.id) ?? new Row(this.open);
      shown.show(row);
      kept.set(row.id, shown);
      if (this.body.children[index] !== shown.element) this.body.insertBefore(shown.element, this.body.children[index] ?? null);
    });
    for (const [id, row] of this.rows) if (!kept.has(id)) row.element.remove();
    this.rows = kept;
    return chosen.length;
  }
}
