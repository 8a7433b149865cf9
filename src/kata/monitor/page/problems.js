// What is wrong with a sandbox, worst first.

import * as format from "./format.js";

export const KINDS = [
  { kind: "failed", label: "failed" },
  { kind: "unreachable", label: "unreachable" },
  { kind: "disk", label: "disk error" },
  { kind: "oom", label: "out of memory" },
  { kind: "memory", label: "near memory limit" },
  { kind: "throttled", label: "throttled" },
  { kind: "slow", label: "slow start" },
  { kind: "exited", label: "exited with error" },
];
const RANK = new Map(KINDS.map(({ kind }, place) => [kind, place]));

const NEAR = 0.9;
const VERY_NEAR = 0.97;
const THROTTLED = 0.1;
const BOOT_S = 120;
const OOM_RECENT_S = 600;

/** `[{kind, grave, text}]`; `now` is the monitor's time. */
export function problemsOf(sandbox, now) {
  const { now: is } = sandbox;
  const found = [];
  const add = (kind, grave, text) => found.push({ kind, grave, text });
  if (is.state === "failed") add("failed", true, is.error ? `failed: ${is.error}` : "failed");
  if (!is.reachable) {
    const since = sandbox.seen ? `, last heard of ${format.age(now - sandbox.seen)} ago` : "";
    add("unreachable", true, `does not answer${since}${is.problem ? `: ${is.problem}` : ""}`);
  }
  if (is.diskError) add("disk", true, `disk error: ${is.diskError}`);
  if (is.state === "booting" && is.created !== null && now - is.created > BOOT_S) {
    add("slow", false, `starting for ${format.age(now - is.created)}`);
  }
  if (sandbox.guestUsed !== null && sandbox.guestUsed !== undefined && is.guestTotal && is.reachable) {
    const part = sandbox.guestUsed / is.guestTotal;
    if (part >= NEAR) add("memory", part >= VERY_NEAR, `guest's memory ${format.percent(part)} in use`);
  }
  for (const container of sandbox.containers.values()) found.push(...ofContainer(container, now));
  return found.sort((one, other) => other.grave - one.grave || RANK.get(one.kind) - RANK.get(other.kind));
}

export function ofContainer(container, now) {
  const { now: is, rates } = container;
  const found = [];
  const add = (kind, grave, text) => found.push({ kind, grave, text: `${is.name}: ${text}` });
  const kills = is.oomKills ?? 0;
  if (is.oomKilled) add("oom", true, "ended for want of memory (OOM)");
  else if (kills > 0) {
    const recent = container.oomRoseAt && now - container.oomRoseAt < OOM_RECENT_S;
    add("oom", Boolean(recent), `${kills === 1 ? "a process was" : `${format.count(kills)} processes were`} OOM-killed`);
  }
  const running = is.state === "running" || is.state === "paused";
  if (running && is.limit && is.memory !== null) {
    const part = is.memory / is.limit;
    if (part >= NEAR) add("memory", part >= VERY_NEAR, `memory ${format.percent(part)} of its limit`);
  }
  if (rates.throttled !== null && rates.throttled !== undefined && rates.throttled >= THROTTLED) {
    add("throttled", false, `throttled ${format.percent(Math.min(1, rates.throttled))} of the time`);
  }
  if (is.state === "stopped" && is.exitCode && !is.oomKilled) {
    add("exited", false, `exited with ${is.exitCode}${is.error ? `: ${is.error}` : ""}`);
  }
  return found;
}
