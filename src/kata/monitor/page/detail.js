// One sandbox.

import { Chart, waterfall } from "./charts.js";
import { arrange, icon, make, setAttribute, setClass, setText } from "./dom.js";
import { eventsTable } from "./events.js";
import * as format from "./format.js";
import { LiveTable } from "./live.js";
import { ofContainer } from "./problems.js";
import { Text } from "./tails.js";
import { toneOf } from "./tone.js";

const TABS = [
  ["overview", "Overview"],
  ["start", "Start"],
  ["events", "Events"],
  ["console", "Console"],
  ["logs", "Logs"],
];

export class Detail {
  constructor(store, view, interval) {
    this.store = store;
    this.view = view;
    this.id = view.open;
    this.title = make("h1", { tabindex: "-1" });
    this.state = make("span.badge");
    this.about = make("p.about");
    this.trouble = make("ul.trouble");
    this.back = make("a.back", { href: view.href({ open: "" }), onclick: (event) => this.leave(event) }, icon("back"), "All sandboxes");
    this.panels = {
      overview: new Overview(interval),
      start: new Start(),
      events: new Happened(store, view),
      console: new Text(view, "console"),
      logs: new Text(view, "logs"),
    };
    this.tabs = new Map(
      TABS.map(([name, title]) => [
        name,
        make(
          "button",
          { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", onclick: () => this.view.set({ tab: name }, true) },
          title,
        ),
      ]),
    );
    this.tablist = make("div.tabs", { role: "tablist", "aria-label": "Of this sandbox" }, ...this.tabs.values());
    this.tablist.addEventListener("keydown", (event) => this.key(event));
    this.panel = make("div.panel", { role: "tabpanel", id: "panel" });
    this.gone = make("p.gone", { hidden: true, role: "status" }, "This sandbox is gone. What was last known of it:");
    this.element = make(
      "div.detail",
      {},
      this.back,
      make("div.title", {}, make("bdi", {}, this.title), this.state),
      this.about,
      this.gone,
      this.trouble,
      this.tablist,
      this.panel,
    );
    this.said = "";
  }

  focus() {
    this.title.focus({ preventScroll: true });
  }

  leave(event) {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
    event.preventDefault();
    this.view.set({ open: "", tab: "overview", container: "" }, true);
  }

  key(event) {
    const names = [...this.tabs.keys()];
    const at = names.indexOf(this.view.tab);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: names.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const name = names[(to + names.length) % names.length];
    this.view.set({ tab: name });
    this.tabs.get(name).focus();
  }

  close() {
    for (const panel of Object.values(this.panels)) panel.close?.();
  }

  draw(problems, live) {
    const found = this.store.sandboxes.get(this.id);
    if (found) this.last = found;
    const sandbox = this.last;
    this.gone.hidden = Boolean(found) || !sandbox;
    if (!sandbox) {
      setText(this.title, "No such sandbox");
      document.title = "No such sandbox · kata";
      setText(this.about, "It has ended, or it has never been on this node.");
      this.state.hidden = this.tablist.hidden = this.panel.hidden = true;
      return;
    }
    this.state.hidden = this.tablist.hidden = this.panel.hidden = false;
    const { now: is } = sandbox;
    const now = this.store.now();
    const state = found ? sandbox.state : "gone";
    setText(this.title, sandbox.name);
    document.title = `${sandbox.name} · kata`;
    setText(this.state, state);
    setClass(this.state, `badge ${toneOf(state)}`);
    setText(this.about, [sandbox.place, is.shownId].filter(Boolean).join(" · "));
    const said = JSON.stringify(problems);
    if (said !== this.said) {
      this.said = said;
      this.trouble.replaceChildren(
        ...problems.map((one) => make(one.grave ? "li.bad" : "li.warn", {}, icon(one.grave ? "grave" : "warning"), make("bdi", {}, one.text))),
      );
    }
    setClass(this.element, `detail${sandbox.stale || !found ? " stale" : ""}`);
    for (const [name, tab] of this.tabs) {
      const here = name === this.view.tab;
      setAttribute(tab, "aria-selected", String(here));
      setAttribute(tab, "tabindex", here ? "0" : "-1");
    }
    setAttribute(this.panel, "aria-labelledby", `tab-${this.view.tab}`);
    const panel = this.panels[this.view.tab];
    for (const one of Object.values(this.panels)) if (one !== panel) one.close?.();
    arrange(this.panel, [panel.element]);
    panel.draw(sandbox, now, live && Boolean(found));
  }
}

class Facts {
  constructor(names) {
    this.values = new Map(names.map((name) => [name, make("bdi")]));
    this.element = make("dl.facts", {}, ...[...this.values].map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  }

  set(name, text, title = "") {
    const value = this.values.get(name);
    setText(value, text || format.NONE);
    setAttribute(value, "title", title || null);
  }
}

class Overview {
  constructor(interval) {
    this.interval = interval;
    this.facts = new Facts(["Age", "Virtual CPUs", "Memory", "Given back", "Overhead", "Load", "Hypervisor", "Agent over", "Client", "Pod's uid"]);
    this.charts = [
      [new Chart("CPU cores", ["on the host"], format.cores), (one) => [one.cpu]],
      [new Chart("Memory", ["guest, in use", "on the host"], format.bytes), (one) => [one.guest, one.host]],
      [new Chart("Network", ["received", "sent"], format.rate), (one) => [one.received, one.sent]],
      [new Chart("Disk", ["read", "written"], format.rate), (one) => [one.read, one.written]],
    ];
    const shown = (read) => (one) => read(one);
    this.containers = new LiveTable(
      "Containers",
      [
        { title: "Container", name: true, text: (one) => one.now.name, hint: (one) => one.now.shownId },
        { title: "Image", name: true, text: (one) => one.now.image, hint: (one) => one.now.image },
        {
          title: "State",
          text: (one) => (one.now.state === "stopped" && one.now.exitCode !== null ? `exited ${one.now.exitCode}` : one.now.state),
          hint: (one) => one.now.error,
          tone: (one) => `badge ${one.now.state === "stopped" && one.now.exitCode ? "bad" : toneOf(one.now.state)}`,
        },
        { title: "Age", number: true, text: (one) => format.age(one.at - (one.now.started ?? one.now.created ?? Number.NaN)), hint: (one) => format.moment(one.now.started) },
        { title: "CPU cores", number: true, text: (one) => format.cores(one.rates.cpu) },
        { title: "Throttled", number: true, text: (one) => format.percent(one.rates.throttled) },
        {
          title: "Memory",
          number: true,
          text: (one) => format.bytes(one.now.memory),
          tone: (one) => (ofContainer(one, one.at).some(({ kind }) => kind === "memory") ? "warn" : ""),
        },
        { title: "Limit", number: true, text: (one) => format.bytes(one.now.limit) },
        { title: "OOM kills", number: true, text: (one) => format.count(one.now.oomKills), tone: (one) => (one.now.oomKills ? "bad" : "") },
        { title: "Processes", number: true, text: (one) => format.count(one.now.pids) },
        { title: "Read", number: true, text: (one) => format.bytes(one.now.read), hint: (one) => format.rate(one.rates.read) },
        { title: "Written", number: true, text: (one) => format.bytes(one.now.written), hint: (one) => format.rate(one.rates.written) },
      ],
      "No container yet.",
    );
    this.processes = new LiveTable("Processes on the host", [
      { title: "Process", name: true, text: shown((one) => one.role) },
      { title: "Pid", number: true, text: shown((one) => (one.pid === null ? format.NONE : String(one.pid))) },
      { title: "CPU time", number: true, text: shown((one) => (one.cpu === null ? format.NONE : `${one.cpu.toFixed(1)} s`)) },
      { title: "Memory", number: true, text: shown((one) => format.bytes(one.rss)) },
      { title: "Threads", number: true, text: shown((one) => format.count(one.threads)) },
      { title: "Read", number: true, text: shown((one) => format.bytes(one.read)) },
      { title: "Written", number: true, text: shown((one) => format.bytes(one.written)) },
    ]);
    this.network = new LiveTable("Network interfaces in the guest", [
      { title: "Interface", name: true, text: shown((one) => one.name) },
      { title: "Received", number: true, text: shown((one) => format.bytes(one.received)) },
      { title: "Packets", number: true, text: shown((one) => format.count(one.receivedPackets)) },
      { title: "Sent", number: true, text: shown((one) => format.bytes(one.sent)) },
      { title: "Packets", number: true, text: shown((one) => format.count(one.sentPackets)) },
    ]);
    this.labels = new LiveTable("Labels", [
      { title: "Label", name: true, text: ([name]) => name },
      { title: "Value", name: true, text: ([, value]) => value },
    ]);
    const part = (title, table) => make("section", {}, make("h2", {}, title), table.element);
    this.element = make(
      "div.overview",
      {},
      this.facts.element,
      make("div.charts", {}, ...this.charts.map(([chart]) => chart.element)),
      part("Containers", this.containers),
      make("div.two", {}, part("Processes on the host", this.processes), part("Network in the guest", this.network)),
      part("Labels", this.labels),
    );
  }

  draw(sandbox, now) {
    const { now: is, history } = sandbox;
    const { facts } = this;
    facts.set("Age", is.created === null ? "" : format.duration(now - is.created), format.moment(is.created));
    facts.set("Virtual CPUs", format.count(is.vcpus));
    facts.set("Memory", `${format.bytes(is.memory)}, guest sees ${format.bytes(is.guestTotal)}`);
    facts.set("Given back", format.bytes(is.returned));
    facts.set("Overhead", format.bytes(is.overhead));
    facts.set("Load", is.load === null ? "" : is.load.toFixed(2));
    facts.set("Hypervisor", [is.hypervisor.name, is.hypervisor.version, is.hypervisor.accelerator && `(${is.hypervisor.accelerator})`].filter(Boolean).join(" "));
    facts.set("Agent over", is.hypervisor.channel);
    facts.set("Client", [is.client, is.namespace].filter(Boolean).join(" / "));
    facts.set("Pod's uid", is.cri.uid);
    const ceilings = [0.5, is.guestTotal ?? 0, 1024, 1024];
    this.charts.forEach(([chart, read], place) => chart.draw(read(history).map((one) => one.values), this.interval, ceilings[place]));
    this.containers.draw(
      [...sandbox.containers].map(([key, one]) => {
        one.at = now;
        return [key, one];
      }),
    );
    this.processes.draw(is.processes.map((one, place) => [`${place}/${one.pid}`, one]));
    this.network.draw(is.network.map((one, place) => [`${place}/${one.name}`, one]));
    this.labels.draw(is.labels.map((one, place) => [`${place}/${one[0]}`, one]));
  }
}

class Start {
  constructor() {
    this.element = make("div.start");
    this.said = "";
  }

  draw(sandbox) {
    const { timings } = sandbox.now;
    const said = JSON.stringify(timings);
    if (said === this.said) return;
    this.said = said;
    if (!timings.length) {
      this.element.replaceChildren(make("p.quiet", {}, "Nothing is known of how this sandbox was started."));
      return;
    }
    const end = Math.max(...timings.map((one) => one.start + one.duration)) - Math.min(...timings.map((one) => one.start));
    this.element.replaceChildren(
      make("p.about", {}, "From the client's command to the container: ", make("strong", {}, format.milliseconds(end)), ". The longest step is marked."),
      make("div.scroll", { tabindex: "0", role: "region", "aria-label": "Steps of the start" }, waterfall(timings)),
    );
  }
}

class Happened {
  constructor(store, view) {
    this.store = store;
    this.table = eventsTable(store, view, true);
    this.element = this.table.element;
  }

  draw(sandbox) {
    this.table.draw(
      this.store.events
        .filter((one) => one.sandbox === sandbox.id)
        .map((one) => [one.key, one])
        .reverse(),
    );
  }
}
