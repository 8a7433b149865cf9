// One sandbox, in a dialog: overview, start, events, console, logs.

import { make, put, svg } from "./dom.js";
import { age, bytes, clean, cleanLines, duration, processors, rate, time } from "./format.js";

const TABS = [["overview", "Overview"], ["start", "Start"], ["events", "Events"], ["console", "Console"], ["logs", "Logs"]];
const TAIL = 65536;

const facts = (pairs) => make("dl", { class: "facts" }, ...pairs.flatMap(([name, value]) =>
  value === null || value === undefined || value === "" ? [] : [make("div", {}, make("dt", { text: name }), make("dd", { text: value }))]));

function table(caption, heads, rows) {
  if (!rows.length) return null;
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, make("table", { class: "inner" },
    make("caption", { text: caption }),
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col", text: head })))),
    make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", { text: cell })))))));
}

function overview(row) {
  const state = row.state;
  const list = (value) => (Array.isArray(value) ? value.filter((one) => one && typeof one === "object") : []);
  return [
    row.troubles.length ? make("ul", { class: "troubles" }, ...row.troubles.map(([weight, text]) =>
      make("li", { text, "data-weight": String(weight) }))) : null,
    facts([
      ["Id", clean(row.id)],
      ["Started", row.created === null ? null : `${time(row.created)}, ${age(row.at - row.created)} ago`],
      ["Client", clean([state.client, state.namespace].filter(Boolean).join(", "))],
      ["Pod", state.cri ? clean(`${state.cri.namespace}/${state.cri.name} (${state.cri.uid})`) : null],
      ["Hypervisor", state.hypervisor ? clean(`${state.hypervisor.name}, ${state.hypervisor.accelerator}, agent by ${state.hypervisor.channel}`) : null],
      ["Processors", state.vcpus ? `${state.vcpus} of the guest, ${processors(row.rates.cpu)} in use, ${processors(row.rates.containerCpu)} by containers` : null],
      ["Guest's memory", row.memory.total === null ? null : `${bytes(row.memory.total)}, ${bytes(state.guest?.memory_available_bytes)} available, ${bytes(row.memory.returned)} given back`],
      ["Host's memory", state.host ? `${bytes(state.host.memory_bytes)}, of it overhead ${bytes(row.memory.overhead)}` : null],
      ["Network", row.rates.received === null ? null : `${rate(row.rates.received)} in, ${rate(row.rates.sent)} out`],
    ]),
    table("Containers", ["Name", "State", "Image", "CPU time", "Memory", "Limit", "Processes", "Read", "Written", "OOM kills"], row.containers.map((one) => [
      clean(one.name || String(one.id ?? "").slice(0, 12)),
      clean(one.state === "stopped" && one.exit_code !== null ? `exited ${one.exit_code}` : one.state),
      clean(one.image), duration(one.cpu_seconds), bytes(one.memory_bytes), bytes(one.memory_limit_bytes),
      clean(one.pids ?? "–"), bytes(one.read_bytes), bytes(one.written_bytes), clean(one.oom_kills ?? "–"),
    ])),
    table("Processes on the host", ["Role", "Pid", "CPU time", "Memory", "Threads", "Read", "Written"], list(state.host?.processes).map((one) => [
      clean(one.role), clean(one.pid), duration(one.cpu_seconds), bytes(one.rss_bytes), clean(one.threads ?? "–"), bytes(one.read_bytes), bytes(one.written_bytes),
    ])),
  ];
}

/** The start as a waterfall: each step where it was, in proportion. */
function waterfall(row) {
  const steps = (Array.isArray(row.state.timings) ? row.state.timings : []).slice(0, 40)
    .filter((one) => one && Number.isFinite(one.start_seconds) && Number.isFinite(one.duration_seconds));
  if (!steps.length) return [make("p", { text: "Nothing is known of its start." })];
  const end = Math.max(...steps.map((one) => one.start_seconds + one.duration_seconds), 0.001);
  const [left, right, line] = [150, 80, 26];
  const width = 700;
  const scale = (width - left - right) / end;
  const bars = steps.flatMap((one, index) => {
    const y = index * line;
    const x = left + Math.max(0, one.start_seconds) * scale;
    const label = svg("text", { x: left - 8, y: y + 17, class: "label", "text-anchor": "end" });
    label.textContent = clean(one.name, 24);
    const long = Math.max(2, one.duration_seconds * scale);
    const value = svg("text", { x: x + long + 6, y: y + 17, class: "value" });
    value.textContent = duration(one.duration_seconds);
    return [label, svg("rect", { x, y: y + 5, width: long, height: line - 10, rx: 3, class: "bar" }), value];
  });
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${steps.length * line}`, class: "waterfall", role: "img",
    "aria-label": `The start took ${duration(end)}: ${steps.map((one) => `${clean(one.name, 24)} ${duration(one.duration_seconds)}`).join(", ")}`,
  }, ...bars);
  return [make("p", { text: `${duration(end)} from the request to the last step.` }), make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Waterfall" }, picture)];
}

/** An event as one line of a list. */
export function eventItem(event, withSandbox) {
  const known = ["time", "event", "sandbox", "container", "client", "namespace"];
  const more = Object.entries(event).filter(([key]) => !known.includes(key))
    .map(([key, value]) => `${clean(key, 30)}=${clean(typeof value === "string" ? value : JSON.stringify(value))}`);
  const bad = /failed|oom|error/.test(event.event) || (event.event === "container.exited" && event.exit_code !== 0);
  const container = String(event.container ?? "");
  return make("li", { "data-weight": bad ? "2" : "0" },
    make("time", { datetime: clean(event.time, 40), text: time(event.time) }),
    make("b", { text: clean(event.event, 40) }),
    withSandbox ? make("span", { class: "id", text: clean(String(event.sandbox ?? "").slice(0, 12)) }) : null,
    container && container !== event.sandbox ? make("span", { class: "id", text: clean(container.slice(0, 12)) }) : null,
    make("span", { class: "note", text: more.join("  ") }));
}

export class Detail {
  constructor(dialog, changed) {
    this.dialog = dialog;
    this.changed = changed;
    this.title = dialog.querySelector("#detail-title");
    this.problem = dialog.querySelector("#detail-problem");
    this.panel = dialog.querySelector("#panel");
    this.tabs = new Map();
    const bar = dialog.querySelector("#tabs");
    for (const [key, title] of TABS) {
      const tab = make("button", { type: "button", role: "tab", id: `tab-${key}`, "aria-controls": "panel", text: title, onclick: () => this.choose(key) });
      this.tabs.set(key, tab);
      bar.append(tab);
    }
    bar.addEventListener("keydown", (event) => this.#arrow(event));
    dialog.querySelector("#close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => {
      this.id = null;
      this.changed(null, null);
    });
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close(); // beside it
    });
    this.id = null;
    this.tab = "overview";
    this.events = [];
  }

  #arrow(event) {
    const keys = TABS.map(([key]) => key);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = keys[(keys.indexOf(this.tab) + step + keys.length) % keys.length];
    this.choose(next);
    this.tabs.get(next).focus();
    event.preventDefault();
  }

  open(id, tab, row) {
    this.id = id;
    this.container = null;
    if (!this.dialog.open) this.dialog.showModal();
    this.show(row);
    this.choose(this.tabs.has(tab) ? tab : "overview");
  }

  choose(tab) {
    this.tab = tab;
    for (const [key, button] of this.tabs) {
      button.setAttribute("aria-selected", String(key === tab));
      button.tabIndex = key === tab ? 0 : -1;
    }
    this.panel.setAttribute("aria-labelledby", `tab-${tab}`);
    this.panel.replaceChildren();
    this.changed(this.id, tab);
    this.#fill(true);
  }

  /** A new sample of the sandbox, or null when it is there no more. */
  show(row) {
    this.row = row ?? this.row;
    if (this.row?.id !== this.id) this.row = null;
    put(this.title, this.row ? this.row.title : clean(String(this.id).slice(0, 12)));
    this.problem.hidden = Boolean(row);
    if (!row) put(this.problem, "This sandbox is not there any more; what follows is the last that was known.");
    if (this.dialog.open) this.#fill(false);
  }

  #fill(fresh) {
    const row = this.row;
    if (this.tab === "console" || this.tab === "logs") {
      if (fresh) this.#text();
      return;
    }
    if (!row) {
      this.panel.replaceChildren(make("p", { text: "Nothing is known of it." }));
      return;
    }
    if (this.tab === "start") {
      if (fresh || this.steps !== row.state.timings?.length) this.panel.replaceChildren(...waterfall(row));
      this.steps = row.state.timings?.length;
    } else if (this.tab === "events") {
      this.tell(null);
    } else if (fresh || !this.panel.contains(document.activeElement) || document.activeElement === this.panel) {
      if (fresh || !String(getSelection())) this.panel.replaceChildren(...overview(row).filter(Boolean));
    }
  }

  /** The events of all sandboxes, newest first; null keeps those that are known. */
  tell(events) {
    if (events) this.events = events;
    if (this.tab !== "events" || this.id === null) return;
    const mine = this.events.filter((event) => event.sandbox === this.id);
    this.panel.replaceChildren(mine.length
      ? make("ol", { class: "events" }, ...mine.map((event) => eventItem(event, false)))
      : make("p", { text: "No event of it is kept." }));
  }

  #text() {
    const output = make("pre", { tabindex: "0", "aria-label": this.tab === "console" ? "Console of the guest" : "Log of the container" });
    const status = make("span", { role: "status", class: "note" });
    const containers = this.row?.containers ?? [];
    const choice = this.tab === "logs" ? make("select", {
      onchange: (event) => {
        this.container = event.target.value;
        load();
      },
    }, ...containers.map((one) => make("option", {
      value: String(one.id), text: clean(one.name || String(one.id).slice(0, 12)), selected: one.id === this.container,
    }))) : null;
    const [id, tab] = [this.id, this.tab];
    const load = async () => {
      put(status, "loading");
      const where = tab === "console" ? "console?" : `logs?container=${encodeURIComponent(choice.value)}&`;
      let text = "";
      try {
        const answer = await fetch(`/api/v1/sandboxes/${encodeURIComponent(id)}/${where}tail=${TAIL}`);
        text = cleanLines(await answer.text());
        if (this.id !== id || this.tab !== tab) return;
        put(status, answer.ok ? (text ? "" : "There is nothing in it.") : text.split("\n")[0]);
        if (!answer.ok) text = "";
      } catch {
        put(status, "The monitor does not answer.");
      }
      const atEnd = output.scrollTop + output.clientHeight >= output.scrollHeight - 4;
      put(output, text);
      if (atEnd) output.scrollTop = output.scrollHeight;
    };
    this.panel.replaceChildren(make("div", { class: "bar" },
      choice ? make("label", { text: "Container " }, choice) : null,
      make("button", { type: "button", text: "Load again", onclick: load }), status), output);
    if (tab === "logs" && !containers.length) put(status, "It has no container.");
    else load();
  }
}

