// What is known of each sandbox: its newest state, what follows from two of them, and a short history.

import { clean, number } from "./format.js";

const HISTORY = 60;
const NEAR_LIMIT = 0.9;
const THROTTLED = 0.25;

const sum = (items, of) => items.reduce((total, one) => total + (number(of(one)) ?? 0), 0);
const list = (value) => (Array.isArray(value) ? value.filter((one) => one && typeof one === "object") : []);

/** Difference of two counters by the seconds between; null without both, or where one has begun anew. */
function perSecond(now, before, seconds) {
  if (number(now) === null || number(before) === null || !(seconds > 0) || now < before) return null;
  return (now - before) / seconds;
}

/** The counters of a state document, added up. */
function counters(state) {
  const containers = list(state.containers);
  const network = list(state.network).filter((one) => one.interface !== "lo");
  return {
    at: number(state.time) ?? 0,
    cpu: number(state.host?.cpu_seconds),
    containerCpu: sum(containers, (one) => one.cpu_seconds),
    throttled: sum(containers, (one) => one.throttled_seconds),
    received: sum(network, (one) => one.received_bytes),
    sent: sum(network, (one) => one.sent_bytes),
    read: sum(containers, (one) => one.read_bytes),
    written: sum(containers, (one) => one.written_bytes),
    ooms: sum(containers, (one) => one.oom_kills),
  };
}

/** What is wrong with a sandbox: sentences, the worst first, each with its weight (3 dead, 2 look at it, 1 note). */
function troubles(state, rates) {
  const found = [];
  if (state.reachable === false) found.push([3, clean(state.problem || "does not answer")]);
  if (state.state === "failed") found.push([3, clean(state.error || "its machine is gone")]);
  if (state.disk_errors > 0) found.push([3, clean(state.disk_error || "a disk of the host fails")]);
  for (const one of list(state.containers)) {
    const name = clean(one.name || String(one.id ?? "").slice(0, 12), 60);
    if (one.oom_kills > 0) found.push([2, `${name}: out of memory, ${one.oom_kills} killed`]);
    if (one.memory_limit_bytes > 0 && one.memory_bytes >= NEAR_LIMIT * one.memory_limit_bytes) {
      found.push([2, `${name}: ${Math.round((100 * one.memory_bytes) / one.memory_limit_bytes)} % of its memory limit`]);
    }
  }
  if (rates.throttled !== null && rates.throttled > THROTTLED) {
    found.push([2, `waits ${Math.round(rates.throttled * 100)} % of the time for its processor limit`]);
  }
  if (["booting", "closing", "ending", "stopped"].includes(state.state)) found.push([1, `is ${state.state}`]);
  return found.sort((one, other) => other[0] - one[0]);
}

/** A sandbox's title and what stands below it. */
function titles(state) {
  const short = String(state.id ?? "").slice(0, 12);
  const pod = state.cri;
  if (pod && pod.name) return [clean(`${pod.namespace}/${pod.name}`, 120), clean(short)];
  const names = list(state.containers).map((one) => one.name).filter(Boolean);
  const name = state.name || names.join(", ");
  return [clean(name || short, 120), clean(name ? short : "")];
}

export class Model {
  constructor() {
    this.node = "";
    this.version = "";
    this.at = 0;
    this.rows = new Map();
  }

  /** Take a snapshot of the monitor in. */
  take(snapshot) {
    this.node = clean(snapshot.node, 80);
    this.version = clean(snapshot.version, 40);
    this.at = number(snapshot.time) ?? Date.now() / 1000;
    const rows = new Map();
    for (const state of list(snapshot.sandboxes)) {
      const id = String(state.id ?? "");
      if (!rows.has(id)) rows.set(id, this.#row(id, state, this.rows.get(id)));
    }
    this.rows = rows;
  }

  #row(id, state, before) {
    const now = counters(state);
    const last = before?.counters;
    const seconds = last ? now.at - last.at : 0;
    // The same sample twice (two tabs): what was known stays.
    if (before && seconds <= 0 && state.reachable !== false) return { ...before, state, at: this.at };
    const rates = {};
    for (const key of ["cpu", "containerCpu", "throttled", "received", "sent", "read", "written"]) {
      rates[key] = last ? perSecond(now[key], last[key], seconds) : null;
    }
    const containers = list(state.containers);
    const memory = {
      used: containers.length || state.reachable !== false ? sum(containers, (one) => one.memory_bytes) : null,
      overhead: number(state.overhead?.memory_bytes),
      returned: number(state.guest?.memory_returned_bytes),
      total: number(state.memory_bytes),
    };
    const found = troubles(state, rates);
    const [title, subtitle] = titles(state);
    const history = [...(before?.history ?? []), { ...rates, memory: memory.used, overhead: memory.overhead }].slice(-HISTORY);
    const paused = containers.length > 0 && containers.every((one) => one.state === "paused");
    return {
      id, state, title, subtitle, rates, memory, containers, history, counters: now, at: this.at,
      troubles: found,
      weight: found.length ? found[0][0] : 0,
      status: state.reachable === false ? "unreachable" : paused ? "paused" : clean(state.state || "unknown", 20),
      created: number(state.created) || null,
    };
  }

  /** Sums over all sandboxes. */
  totals() {
    const rows = [...this.rows.values()];
    return {
      sandboxes: rows.length,
      states: rows.reduce((counts, row) => counts.set(row.status, (counts.get(row.status) ?? 0) + 1), new Map()),
      cpu: sum(rows, (row) => row.rates.cpu),
      containerCpu: sum(rows, (row) => row.rates.containerCpu),
      memory: sum(rows, (row) => row.memory.used),
      overhead: sum(rows, (row) => row.memory.overhead),
      returned: sum(rows, (row) => row.memory.returned),
      received: sum(rows, (row) => row.rates.received),
      sent: sum(rows, (row) => row.rates.sent),
    };
  }
}

/** Whether a row has the words of a filter, each somewhere. */
export function matches(row, words) {
  if (!words.length) return true;
  const text = [
    row.id, row.title, row.status, row.state.client, row.state.namespace, row.state.hypervisor?.name,
    ...row.containers.flatMap((one) => [one.id, one.name, one.image, one.state]),
    ...row.troubles.map(([, sentence]) => sentence),
  ].join("\n").toLowerCase();
  return words.every((word) => text.includes(word));
}
