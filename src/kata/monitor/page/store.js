// What the monitor has said, made safe to use: every member has its type here, every text is cleaned, lists are
// bounded. Rates come from two samples; history is kept here, in the browser, and nowhere else.

import { clean } from "./text.js";

export const KEPT = 150;
const MOST = { sandboxes: 5000, containers: 200, labels: 64, network: 32, timings: 200, processes: 64, events: 500 };

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const object = (value) => (isObject(value) ? value : {});
const list = (value, most) => (Array.isArray(value) ? value.slice(0, most).filter(isObject) : []);
const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);
const amount = (value) => (number(value) !== null && value >= 0 ? value : null);
const total = (values) => values.reduce((sum, one) => (one === null ? sum : (sum ?? 0) + one), null);

/** A series of numbers, null where nothing was known, the newest last. */
export class History {
  constructor() {
    this.values = [];
  }

  add(value) {
    this.values.push(value);
    if (this.values.length > KEPT) this.values.shift();
  }
}

function labelsOf(value) {
  return Object.entries(object(value))
    .slice(0, MOST.labels)
    .map(([name, text]) => [clean(name), clean(text, 256)]);
}

function containerOf(raw) {
  return {
    id: typeof raw.id === "string" ? raw.id : "",
    shownId: clean(raw.id),
    name: clean(raw.name) || clean(raw.id) || "(no name)",
    image: clean(raw.image, 200),
    state: clean(raw.state, 24) || "unknown",
    error: clean(raw.error, 256),
    created: number(raw.created),
    started: number(raw.started),
    exitCode: number(raw.exit_code),
    oomKilled: raw.oom_killed === true,
    oomKills: amount(raw.oom_kills),
    cpuSeconds: amount(raw.cpu_seconds),
    throttledSeconds: amount(raw.throttled_seconds),
    memory: amount(raw.memory_bytes),
    limit: amount(raw.memory_limit_bytes),
    pids: amount(raw.pids),
    read: amount(raw.read_bytes),
    written: amount(raw.written_bytes),
    labels: labelsOf(raw.labels),
  };
}

function documentOf(raw) {
  const hypervisor = object(raw.hypervisor);
  const host = object(raw.host);
  const guest = object(raw.guest);
  const overhead = object(raw.overhead);
  const cri = object(raw.cri);
  return {
    id: typeof raw.id === "string" ? raw.id.slice(0, 512) : "",
    shownId: clean(raw.id),
    time: number(raw.time),
    client: clean(raw.client, 24),
    namespace: clean(raw.namespace, 64),
    state: clean(raw.state, 24) || "unknown",
    error: clean(raw.error, 256),
    created: number(raw.created),
    ownName: clean(raw.name),
    labels: labelsOf(raw.labels),
    cri: { name: clean(cri.name), namespace: clean(cri.namespace), uid: clean(cri.uid) },
    reachable: raw.reachable !== false,
    problem: clean(raw.problem, 256),
    diskError: clean(raw.disk_error, 256),
    hypervisor: {
      name: clean(hypervisor.name, 32),
      version: clean(hypervisor.version, 64),
      accelerator: clean(hypervisor.accelerator, 16),
      channel: clean(hypervisor.channel, 16),
    },
    vcpus: amount(raw.vcpus),
    memory: amount(raw.memory_bytes),
    hostCpu: amount(host.cpu_seconds),
    hostMemory: amount(host.memory_bytes),
    processes: list(host.processes, MOST.processes).map((one) => ({
      role: clean(one.role, 32),
      pid: amount(one.pid),
      cpu: amount(one.cpu_seconds),
      rss: amount(one.rss_bytes),
      threads: amount(one.threads),
      read: amount(one.read_bytes),
      written: amount(one.written_bytes),
    })),
    guestTotal: amount(guest.memory_total_bytes),
    guestAvailable: amount(guest.memory_available_bytes),
    returned: amount(guest.memory_returned_bytes),
    load: amount(guest.load1),
    overhead: amount(overhead.memory_bytes),
    network: list(raw.network, MOST.network).map((one) => ({
      name: clean(one.interface, 32),
      received: amount(one.received_bytes),
      sent: amount(one.sent_bytes),
      receivedPackets: amount(one.received_packets),
      sentPackets: amount(one.sent_packets),
    })),
    containers: list(raw.containers, MOST.containers).map(containerOf),
    timings: list(raw.timings, MOST.timings)
      .map((one) => ({ name: clean(one.name, 64), start: number(one.start_seconds), duration: amount(one.duration_seconds) }))
      .filter((one) => one.start !== null && one.duration !== null),
  };
}

export function eventOf(raw) {
  const at = typeof raw.time === "string" ? Date.parse(raw.time) / 1000 : Number.NaN;
  const rest = Object.entries(raw)
    .filter(([name]) => !["time", "event", "sandbox", "container", "client", "namespace"].includes(name))
    .slice(0, 12)
    .map(([name, value]) => [clean(name, 32), clean(isObject(value) ? JSON.stringify(value) : value, 256)])
    .filter(([, value]) => value !== "");
  return {
    key: JSON.stringify(raw).slice(0, 4096),
    at: Number.isFinite(at) ? at : null,
    event: clean(raw.event, 64) || "(no name)",
    sandbox: typeof raw.sandbox === "string" ? raw.sandbox.slice(0, 512) : "",
    shownSandbox: clean(raw.sandbox),
    container: clean(raw.container),
    rest,
  };
}

const perSecond = (now, before, seconds) =>
  now === null || before === null || before === undefined || now < before || !(seconds > 0) ? null : (now - before) / seconds;

/** One sandbox with its past. */
class Sandbox {
  constructor() {
    this.now = null;
    this.seen = 0;
    this.stale = false;
    this.rates = {};
    this.history = Object.fromEntries(
      ["cpu", "guest", "host", "received", "sent", "read", "written"].map((name) => [name, new History()]),
    );
    this.containers = new Map();
  }

  update(found, at) {
    const before = this.now;
    if (!found.reachable && before) {
      // What was last known stays to be seen, marked as such.
      this.now = { ...before, reachable: false, problem: found.problem, cri: found.cri };
      this.stale = true;
      this.rates = {};
      for (const one of Object.values(this.history)) one.add(null);
      for (const one of this.containers.values()) one.pass();
      return;
    }
    this.stale = !found.reachable;
    this.seen = found.reachable ? at : 0;
    this.now = found;
    const seconds = before && found.time !== null && before.time !== null ? found.time - before.time : 0;
    if (before && found.reachable && seconds <= 0 && found.time !== null) return; // the same sample again
    const cards = (one) => one.network.filter((card) => card.name !== "lo");
    const flows = (one) =>
      one && {
        received: total(cards(one).map((card) => card.received)),
        sent: total(cards(one).map((card) => card.sent)),
        read: total(one.containers.map((each) => each.read)),
        written: total(one.containers.map((each) => each.written)),
      };
    const [new_, old] = [flows(found), flows(before)];
    this.rates = {
      cpu: perSecond(found.hostCpu, before?.hostCpu, seconds),
      received: perSecond(new_.received, old?.received, seconds),
      sent: perSecond(new_.sent, old?.sent, seconds),
      read: perSecond(new_.read, old?.read, seconds),
      written: perSecond(new_.written, old?.written, seconds),
    };
    const used = found.guestTotal !== null && found.guestAvailable !== null ? found.guestTotal - found.guestAvailable : null;
    this.guestUsed = used !== null && used >= 0 ? used : null;
    const { history, rates } = this;
    history.cpu.add(rates.cpu);
    history.guest.add(this.guestUsed);
    history.host.add(found.hostMemory);
    for (const name of ["received", "sent", "read", "written"]) history[name].add(rates[name]);
    const there = new Set();
    found.containers.forEach((one, place) => {
      const key = one.id || `#${place}`;
      there.add(key);
      if (!this.containers.has(key)) this.containers.set(key, new Container(key));
      this.containers.get(key).update(one, seconds, at);
    });
    for (const key of this.containers.keys()) if (!there.has(key)) this.containers.delete(key);
  }

  get id() {
    return this.now.id;
  }

  get name() {
    const { cri, ownName, shownId } = this.now;
    return cri.name || ownName || shownId || "(no name)";
  }

  /** In one word. */
  get state() {
    const { reachable, state, containers } = this.now;
    if (!reachable) return "unreachable";
    return containers.length && containers.every((one) => one.state === "paused") ? "paused" : state;
  }

  /** What is said below the name: where it belongs. */
  get place() {
    const { cri, client, namespace } = this.now;
    if (cri.name) return cri.namespace ? `pod in ${cri.namespace}` : "pod";
    return [client, namespace].filter(Boolean).join(" / ");
  }
}

class Container {
  constructor(key) {
    this.key = key;
    this.now = null;
    this.rates = {};
    this.oomRoseAt = 0;
    this.history = { cpu: new History() };
  }

  update(found, seconds, at) {
    const before = this.now;
    this.now = found;
    this.rates = {
      cpu: perSecond(found.cpuSeconds, before?.cpuSeconds, seconds),
      throttled: perSecond(found.throttledSeconds, before?.throttledSeconds, seconds),
      read: perSecond(found.read, before?.read, seconds),
      written: perSecond(found.written, before?.written, seconds),
    };
    if (before && (found.oomKills ?? 0) > (before.oomKills ?? 0)) this.oomRoseAt = at;
    this.history.cpu.add(this.rates.cpu);
  }

  pass() {
    this.rates = {};
    this.history.cpu.add(null);
  }
}

/** Everything. */
export class Store {
  constructor() {
    this.sandboxes = new Map();
    this.events = [];
    this.node = "";
    this.version = "";
    this.time = 0;
    this.offset = 0;
    this.known = false;
    this.totals = {};
    this.history = Object.fromEntries(
      ["cpu", "host", "guest", "overhead", "returned", "count"].map((name) => [name, new History()]),
    );
  }

  /** The monitor's time now, whatever the clock of the reader says. */
  now() {
    return Date.now() / 1000 + this.offset;
  }

  snapshot(raw) {
    this.known = true;
    this.node = clean(raw.node, 64);
    this.version = clean(raw.version, 32);
    this.time = number(raw.time) ?? Date.now() / 1000;
    this.offset = this.time - Date.now() / 1000;
    const there = new Set();
    for (const one of list(raw.sandboxes, MOST.sandboxes)) {
      const found = documentOf(one);
      if (there.has(found.id)) continue;
      there.add(found.id);
      if (!this.sandboxes.has(found.id)) this.sandboxes.set(found.id, new Sandbox());
      this.sandboxes.get(found.id).update(found, this.time);
    }
    for (const id of this.sandboxes.keys()) if (!there.has(id)) this.sandboxes.delete(id);
    const all = [...this.sandboxes.values()];
    const live = all.filter((one) => !one.stale);
    this.totals = {
      cpu: total(live.map((one) => one.rates.cpu ?? null)),
      host: total(live.map((one) => one.now.hostMemory)),
      guest: total(live.map((one) => one.guestUsed ?? null)),
      guestTotal: total(live.map((one) => one.now.guestTotal)),
      overhead: total(live.map((one) => one.now.overhead)),
      returned: total(live.map((one) => one.now.returned)),
      count: all.length,
      containers: all.reduce((sum, one) => sum + one.now.containers.length, 0),
      vcpus: total(live.map((one) => one.now.vcpus)),
    };
    for (const [name, history] of Object.entries(this.history)) history.add(this.totals[name]);
  }

  /** Where nothing was heard for a while, lines are broken. The last figures stay as they are. */
  gap() {
    const sandboxes = [...this.sandboxes.values()];
    const containers = sandboxes.flatMap((one) => [...one.containers.values()]);
    for (const { history } of [this, ...sandboxes, ...containers]) for (const one of Object.values(history)) one.add(null);
  }

  addEvents(raw, whole = false) {
    const known = new Set(this.events.map((one) => one.key));
    for (const one of list(raw, 10000)) {
      const found = eventOf(one);
      if (known.has(found.key)) continue;
      known.add(found.key);
      this.events.push(found);
    }
    // Those that arrive live are in order; a list that is fetched beside them may not be.
    if (whole) this.events.sort((one, other) => (one.at ?? 0) - (other.at ?? 0));
    if (this.events.length > MOST.events) this.events.splice(0, this.events.length - MOST.events);
  }
}
