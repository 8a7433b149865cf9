// The first view: totals, what is wrong, and every sandbox with its containers.

import { Sparkline } from "./charts.js";
import { arrange, icon, make, setAttribute, setClass, setText } from "./dom.js";
import * as format from "./format.js";
import { KINDS, ofContainer } from "./problems.js";
import { toneOf } from "./tone.js";

const COLUMNS = [
  { key: "name", title: "Sandbox", up: true },
  { key: "state", title: "State", up: true },
  { key: "age", title: "Age", number: true },
  { key: "cpu", title: "CPU cores", number: true, hint: "in use, on the host" },
  { key: "memory", title: "Guest memory", number: true, hint: "in use, of what the guest has" },
  { key: "overhead", title: "Overhead", number: true, hint: "memory on the host beyond that of the containers" },
  { key: "returned", title: "Given back", number: true, hint: "guest memory that takes none of the host's" },
  { key: "network", title: "Network", number: true, hint: "received and sent" },
  { key: "disk", title: "Disk", number: true, hint: "read and written by the containers" },
];
const SORTS = [{ key: "problems", title: "Problems first" }, ...COLUMNS];
const HOLD_MS = 4000;
const SHOWN_PROBLEMS = 3;
const collator = new Intl.Collator("en", { numeric: true });

const sum = (one, other) => (one === null || one === undefined ? other : other === null || other === undefined ? one : one + other);

const SORT_VALUE = {
  name: (one) => one.name,
  state: (one) => one.state,
  age: (one) => (one.now.created === null ? null : -one.now.created),
  cpu: (one) => one.rates.cpu,
  memory: (one) => one.guestUsed,
  overhead: (one) => one.now.overhead,
  returned: (one) => one.now.returned,
  network: (one) => sum(one.rates.received, one.rates.sent),
  disk: (one) => sum(one.rates.read, one.rates.written),
};

function cell(className, ...children) {
  return make(`div.${className}`, { role: "cell" }, ...children);
}

/** Two figures, one above the other, with what they are in front. */
function pair(className, first, second) {
  const values = [make("span.number"), make("span.number")];
  const element = cell(
    className,
    make("span.of", {}, make("abbr", { title: first[1] }, first[0]), values[0]),
    make("span.of", {}, make("abbr", { title: second[1] }, second[0]), values[1]),
  );
  return { element, values };
}

class Bar {
  constructor() {
    this.fill = make("span.fill");
    this.element = make("span.meter", { "aria-hidden": "true" }, this.fill);
  }

  set(part) {
    const known = typeof part === "number" && Number.isFinite(part);
    this.fill.style.width = `${known ? Math.min(100, part * 100).toFixed(1) : 0}%`;
    setClass(this.element, `meter${known && part >= 0.97 ? " bad" : known && part >= 0.9 ? " warn" : ""}`);
  }
}

class Row {
  constructor(sandbox) {
    this.name = make("a.name", { href: "#" });
    this.place = make("span.place");
    this.state = make("span.badge");
    this.age = make("span.number");
    this.cpu = make("span.number");
    this.cpuLine = new Sparkline();
    this.memory = make("span.number");
    this.memoryBar = new Bar();
    this.overhead = make("span.number");
    this.returned = make("span.number");
    this.network = pair("c-network", ["↓", "received"], ["↑", "sent"]);
    this.disk = pair("c-disk", ["R", "read"], ["W", "written"]);
    this.line = make(
      "div.row.main",
      { role: "row" },
      make("div.c-name", { role: "rowheader" }, make("bdi", {}, this.name), this.place),
      cell("c-state", this.state),
      cell("c-age", this.age),
      cell("c-cpu", this.cpuLine.element, this.cpu),
      cell("c-memory", this.memory, this.memoryBar.element),
      cell("c-overhead", this.overhead),
      cell("c-returned", this.returned),
      this.network.element,
      this.disk.element,
    );
    this.trouble = make("ul.trouble");
    this.troubleRow = make("div.row.wide", { role: "row" }, make("div", { role: "cell", "aria-colspan": COLUMNS.length }, this.trouble));
    this.said = "";
    this.containers = new Map();
    this.element = make("div.sandbox", { role: "rowgroup" }, this.line);
    this.onScreen = true;
    this.id = sandbox.id;
    this.element.row = this;
  }

  draw(sandbox, problems, view, now) {
    const { now: is, rates } = sandbox;
    const grave = problems.some((one) => one.grave);
    setClass(this.element, `sandbox${grave ? " bad" : problems.length ? " warn" : ""}${sandbox.stale ? " stale" : ""}`);
    setText(this.name, sandbox.name);
    setAttribute(this.name, "href", view.href({ open: sandbox.id, tab: "overview", container: "" }));
    setAttribute(this.name, "title", is.shownId);
    setText(this.place, sandbox.place);
    const { state } = sandbox;
    setText(this.state, state);
    setClass(this.state, `badge ${toneOf(state)}`);
    setText(this.age, is.created === null ? format.NONE : format.age(now - is.created));
    setAttribute(this.age, "title", format.moment(is.created));
    setText(this.cpu, format.cores(rates.cpu));
    setText(this.memory, `${format.bytes(sandbox.guestUsed)} / ${format.bytes(is.guestTotal ?? is.memory)}`);
    this.memoryBar.set(sandbox.guestUsed / is.guestTotal);
    setText(this.overhead, format.bytes(is.overhead));
    setText(this.returned, format.bytes(is.returned));
    setText(this.network.values[0], format.rate(rates.received));
    setText(this.network.values[1], format.rate(rates.sent));
    setText(this.disk.values[0], format.rate(rates.read));
    setText(this.disk.values[1], format.rate(rates.written));
    if (this.onScreen) this.cpuLine.draw(sandbox.history.cpu.values, 0.1);
    this.complain(problems);
    const rows = view.containers === "yes" ? this.containerRows(sandbox, now) : [];
    arrange(this.element, problems.length ? [this.line, this.troubleRow, ...rows] : [this.line, ...rows]);
  }

  complain(problems) {
    const said = JSON.stringify(problems);
    if (said === this.said) return;
    this.said = said;
    const more = problems.length - SHOWN_PROBLEMS;
    this.trouble.replaceChildren(
      ...problems
        .slice(0, SHOWN_PROBLEMS)
        .map((one) => make(one.grave ? "li.bad" : "li.warn", {}, icon(one.grave ? "grave" : "warning"), make("bdi", {}, one.text))),
      ...(more > 0 ? [make("li", {}, `and ${more} more`)] : []),
    );
  }

  containerRows(sandbox, now) {
    const rows = [];
    for (const [key, container] of sandbox.containers) {
      if (!this.containers.has(key)) this.containers.set(key, new ContainerRow());
      const row = this.containers.get(key);
      row.draw(container, now, this.onScreen);
      rows.push(row.element);
    }
    for (const key of this.containers.keys()) if (!sandbox.containers.has(key)) this.containers.delete(key);
    return rows;
  }
}

class ContainerRow {
  constructor() {
    this.name = make("bdi.name");
    this.image = make("bdi.place");
    this.state = make("span.state");
    this.age = make("span.number");
    this.cpu = make("span.number");
    this.cpuLine = new Sparkline();
    this.memory = make("span.number");
    this.memoryBar = new Bar();
    this.disk = pair("c-disk", ["R", "read"], ["W", "written"]);
    this.element = make(
      "div.row.container",
      { role: "row" },
      make("div.c-name", { role: "rowheader" }, this.name, this.image),
      cell("c-state", this.state),
      cell("c-age", this.age),
      cell("c-cpu", this.cpuLine.element, this.cpu),
      cell("c-memory", this.memory, this.memoryBar.element),
      cell("c-overhead"),
      cell("c-returned"),
      cell("c-network"),
      this.disk.element,
    );
  }

  draw(container, now, onScreen) {
    const { now: is, rates } = container;
    const problems = ofContainer(container, now);
    setClass(this.element, `row container${problems.some((one) => one.grave) ? " bad" : problems.length ? " warn" : ""}`);
    setText(this.name, is.name);
    setAttribute(this.name, "title", is.shownId);
    setText(this.image, is.image);
    const ended = is.state === "stopped" && is.exitCode !== null;
    setText(this.state, ended ? `exited ${is.exitCode}` : is.state);
    setClass(this.state, `state ${ended && is.exitCode === 0 ? "quiet" : toneOf(ended ? "failed" : is.state)}`);
    const since = is.started ?? is.created;
    setText(this.age, since === null ? format.NONE : format.age(now - since));
    setAttribute(this.age, "title", format.moment(since));
    setText(this.cpu, format.cores(rates.cpu));
    setText(this.memory, is.limit ? `${format.bytes(is.memory)} / ${format.bytes(is.limit)}` : format.bytes(is.memory));
    setClass(this.memoryBar.element, "meter");
    this.memoryBar.set(is.limit ? is.memory / is.limit : null);
    this.memoryBar.element.hidden = !is.limit;
    setText(this.disk.values[0], format.rate(rates.read));
    setText(this.disk.values[1], format.rate(rates.written));
    if (onScreen) this.cpuLine.draw(container.history.cpu.values, 0.1);
  }
}

class Tile {
  constructor(title, hint) {
    this.value = make("span.value");
    this.more = make("span.more");
    this.line = new Sparkline(96, 28);
    this.element = make("li.tile", { title: hint }, make("span.title", {}, title), this.value, this.more, this.line.element);
  }

  draw(value, more, values) {
    setText(this.value, value);
    setText(this.more, more);
    this.line.draw(values);
  }
}

export class List {
  constructor(store, view) {
    this.store = store;
    this.view = view;
    this.rows = new Map();
    this.order = [];
    this.touched = -HOLD_MS;
    this.tiles = {
      count: new Tile("Sandboxes", "on this node"),
      cpu: new Tile("CPU", "cores in use by all sandboxes, on the host"),
      host: new Tile("Host memory", "taken by all processes of all sandboxes"),
      guest: new Tile("Guest memory", "in use inside the guests, of what they have"),
      overhead: new Tile("Overhead", "memory of the host beyond that of the containers"),
      returned: new Tile("Given back", "guest memory that takes none of the host's"),
    };
    this.chips = new Map();
    this.chipBox = make("div.chips", { role: "group", "aria-label": "Show" });
    for (const { kind, label } of [{ kind: "all", label: "All" }, { kind: "problems", label: "With problems" }, ...KINDS]) {
      const number = make("span.number");
      const chip = make("button.chip", { type: "button", onclick: () => this.view.set({ show: kind }) }, label, " ", number);
      this.chips.set(kind, { chip, number });
    }
    this.well = make("span.well", {}, icon("check"), "nothing is wrong");
    this.filter = make("input", {
      type: "search",
      id: "filter",
      placeholder: "Filter: name, pod, image, label=value",
      "aria-label": "Filter",
      autocomplete: "off",
      spellcheck: "false",
      maxlength: "200",
      oninput: () => this.view.set({ q: this.filter.value }),
    });
    this.sort = make(
      "select",
      { id: "sort", onchange: () => this.view.set({ sort: this.sort.value, order: "" }) },
      ...SORTS.map((one) => make("option", { value: one.key }, one.title)),
    );
    this.containers = make(
      "button.chip",
      { type: "button", id: "containers", onclick: () => this.view.set({ containers: this.view.containers === "yes" ? "no" : "yes" }) },
      icon("containers"),
      "Containers",
    );
    this.heads = new Map();
    const head = COLUMNS.map((column) => {
      const button = make("button", { type: "button", title: column.hint ?? null, onclick: () => this.sortBy(column) }, make("span", {}, column.title));
      const element = make(`div.c-${column.key}`, { role: "columnheader" }, button);
      this.heads.set(column.key, { element, button });
      return element;
    });
    this.table = make(
      "div.sandboxes",
      { role: "table", "aria-label": "Sandboxes" },
      make("div.head", { role: "rowgroup" }, make("div.row", { role: "row" }, ...head)),
    );
    this.head = this.table.firstChild;
    this.none = make("div.none", { hidden: true });
    this.element = make(
      "div.list",
      {},
      make("h1.hidden", {}, "Sandboxes"),
      make("ul.totals", { "aria-label": "In all" }, ...Object.values(this.tiles).map((tile) => tile.element)),
      this.chipBox,
      make(
        "div.toolbar",
        {},
        make("label.search", {}, icon("search"), this.filter),
        make("label.sorting", {}, make("span", {}, "Sort"), this.sort),
        this.containers,
      ),
      this.table,
      this.none,
    );
    this.watch = new IntersectionObserver((seen) => {
      for (const one of seen) {
        const { row } = one.target;
        row.onScreen = one.isIntersecting;
        if (row.onScreen) this.drawRow(row);
      }
    });
    const touched = () => {
      this.touched = performance.now();
    };
    this.table.addEventListener("pointermove", touched);
    this.table.addEventListener("keydown", (event) => {
      touched();
      this.key(event);
    });
    this.table.addEventListener("click", (event) => this.click(event));
  }

  /** A click anywhere in a sandbox opens it; with a modifier, and on text that is being marked, it does what it always does. */
  click(event) {
    const row = event.target.closest(".sandbox")?.row;
    if (!row || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey || event.button !== 0) return;
    if (event.target.closest("a") !== row.name && String(getSelection())) return;
    event.preventDefault();
    this.view.set({ open: row.id, tab: "overview", container: "" }, true);
  }

  key(event) {
    const by = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1 }[event.key];
    const row = event.target.closest(".sandbox")?.row;
    if (!by || !row || event.ctrlKey || event.metaKey || event.altKey) return;
    const next = this.rows.get(this.order[this.order.indexOf(row.id) + by]);
    if (!next) return;
    event.preventDefault();
    next.name.focus();
  }

  sortBy({ key, up }) {
    const first = up ? "up" : "down";
    const { sort, order } = this.view;
    if (sort !== key) this.view.set({ sort: key, order: "" });
    else if ((order || first) === first) this.view.set({ order: first === "up" ? "down" : "up" });
    else this.view.set({ sort: "problems", order: "" });
  }

  focus(id) {
    this.rows.get(id)?.name.focus();
  }

  matches(sandbox, problems) {
    const words = this.view.q.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return true;
    const { now } = sandbox;
    const text = [
      sandbox.name,
      now.shownId,
      now.ownName,
      now.client,
      now.namespace,
      now.cri.namespace,
      sandbox.state,
      ...problems.map((one) => one.text),
      ...now.labels.map((pair) => pair.join("=")),
      ...now.containers.flatMap((one) => [one.name, one.shownId, one.image, one.state, ...one.labels.map((pair) => pair.join("="))]),
    ]
      .join("\n")
      .toLowerCase();
    return words.every((word) => text.includes(word));
  }

  sorted(all, problems) {
    const { sort, order } = this.view;
    const byName = (one, other) => collator.compare(one.name, other.name) || (one.id < other.id ? -1 : 1);
    if (sort === "problems") {
      const weight = (one) => problems.get(one.id).reduce((most, each) => Math.max(most, each.grave ? 2 : 1), 0);
      const place = (one) => KINDS.findIndex(({ kind }) => kind === problems.get(one.id)[0]?.kind);
      return all.sort((one, other) => weight(other) - weight(one) || place(one) - place(other) || byName(one, other));
    }
    const column = COLUMNS.find((one) => one.key === sort);
    const sign = (order || (column.up ? "up" : "down")) === "up" ? 1 : -1;
    const value = SORT_VALUE[sort];
    return all.sort((one, other) => {
      const [a, b] = [value(one) ?? null, value(other) ?? null];
      if (a === null || b === null) return (a === null) - (b === null) || byName(one, other);
      const by = typeof a === "string" ? collator.compare(a, b) : a - b;
      return by * sign || byName(one, other);
    });
  }

  /** `asked`: the reader has changed the view, so that the order may change at once. */
  draw(problems, asked) {
    const { store, view } = this;
    this.problems = problems;
    const all = [...store.sandboxes.values()];
    this.drawTotals();
    this.drawTools(all, problems);
    const shown = all.filter(
      (one) =>
        (view.show === "all" || problems.get(one.id).some((each) => view.show === "problems" || each.kind === view.show)) && this.matches(one, problems.get(one.id)),
    );
    const here = new Map(shown.map((one) => [one.id, one]));
    // While somebody points at a row, or walks through them, it does not slip away.
    const held = !asked && performance.now() - this.touched < HOLD_MS;
    let ordered = this.sorted(shown, problems).map((one) => one.id);
    if (held) {
      const kept = this.order.filter((id) => here.has(id));
      const before = new Set(kept);
      ordered = [...kept, ...ordered.filter((id) => !before.has(id))];
    }
    this.order = ordered;
    for (const [id, row] of this.rows) {
      if (store.sandboxes.has(id)) continue;
      this.watch.unobserve(row.element);
      this.rows.delete(id);
    }
    const elements = ordered.map((id) => {
      if (!this.rows.has(id)) {
        const row = new Row(here.get(id));
        this.rows.set(id, row);
        this.watch.observe(row.element);
      }
      const row = this.rows.get(id);
      this.drawRow(row);
      return row.element;
    });
    const focused = this.table.contains(document.activeElement) ? document.activeElement : null;
    arrange(this.table, [this.head, ...elements]);
    // An element that is moved loses the focus.
    if (focused?.isConnected && document.activeElement !== focused) focused.focus({ preventScroll: true });
    setAttribute(this.table, "aria-rowcount", String(ordered.length + 1));
    this.drawNone(all.length, ordered.length);
  }

  drawRow(row) {
    const sandbox = this.store.sandboxes.get(row.id);
    if (sandbox) row.draw(sandbox, this.problems.get(row.id) ?? [], this.view, this.store.now());
  }

  drawTotals() {
    const { totals, history } = this.store;
    const values = (name) => history[name].values;
    this.tiles.count.draw(format.count(totals.count), `${format.count(totals.containers)} container${totals.containers === 1 ? "" : "s"}`, values("count"));
    this.tiles.cpu.draw(format.cores(totals.cpu), `cores · ${format.count(totals.vcpus)} virtual`, values("cpu"));
    this.tiles.host.draw(format.bytes(totals.host), "all processes", values("host"));
    this.tiles.guest.draw(format.bytes(totals.guest), `of ${format.bytes(totals.guestTotal)}`, values("guest"));
    const part = totals.host ? totals.overhead / totals.host : null;
    this.tiles.overhead.draw(format.bytes(totals.overhead), part === null ? "" : `${format.percent(part)} of it`, values("overhead"));
    this.tiles.returned.draw(format.bytes(totals.returned), "by the guests", values("returned"));
  }

  drawTools(all, problems) {
    const { view } = this;
    const many = new Map([["all", all.length], ["problems", 0]]);
    for (const one of all) {
      const found = problems.get(one.id);
      if (found.length) many.set("problems", many.get("problems") + 1);
      for (const kind of new Set(found.map((each) => each.kind))) many.set(kind, (many.get(kind) ?? 0) + 1);
    }
    const shown = [];
    for (const [kind, { chip, number }] of this.chips) {
      setText(number, String(many.get(kind) ?? 0));
      setAttribute(chip, "aria-pressed", String(view.show === kind));
      const grave = !["all", "problems", "memory", "throttled", "slow", "exited"].includes(kind);
      setClass(chip, `chip${kind === "all" ? "" : many.get(kind) ? (grave ? " bad" : " warn") : ""}`);
      if (kind === "all" || kind === "problems" || many.get(kind) || view.show === kind) shown.push(chip);
    }
    if (!many.get("problems") && all.length) shown.push(this.well);
    arrange(this.chipBox, shown);
    if (this.filter.value !== view.q) this.filter.value = view.q;
    this.sort.value = view.sort;
    setAttribute(this.containers, "aria-pressed", String(view.containers === "yes"));
    for (const column of COLUMNS) {
      const { element, button } = this.heads.get(column.key);
      const here = view.sort === column.key;
      const up = (view.order || (column.up ? "up" : "down")) === "up";
      setAttribute(element, "aria-sort", here ? (up ? "ascending" : "descending") : null);
      const sign = here ? (up ? "up" : "down") : "";
      if (button.dataset.sign !== sign) {
        button.dataset.sign = sign;
        button.querySelector(".icon")?.remove();
        if (sign) button.append(icon(sign));
      }
    }
  }

  drawNone(all, shown) {
    this.none.hidden = shown > 0;
    this.table.hidden = shown === 0;
    const which = shown ? "" : all ? "filtered" : "empty";
    if (this.none.dataset.which === which) return;
    this.none.dataset.which = which;
    if (which === "filtered") {
      this.none.replaceChildren(
        make("h2", {}, "No sandbox is like that"),
        make("p", {}, "Others are there, but the filter leaves them out."),
        make("button.action", { type: "button", onclick: () => this.view.set({ q: "", show: "all" }) }, "Show all"),
      );
    } else if (which === "empty") {
      this.none.replaceChildren(
        make("h2", {}, "No sandbox runs on this node"),
        make("p", {}, "One that starts is shown here by itself. To start one:"),
        make(
          "pre",
          { tabindex: "0", "aria-label": "Commands that start one" },
          "kata run --rm -it docker.io/library/busybox sh\nctr run --rm -t --runtime io.containerd.kata.v2 docker.io/library/busybox:latest try sh\ndocker run --rm -it --runtime kata busybox sh",
        ),
      );
    }
  }
}
