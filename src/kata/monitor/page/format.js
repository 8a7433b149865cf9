// Numbers as people read them. What is not known is a dash.

export const NONE = "–";
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** A size, with three significant digits. */
export function bytes(value) {
  if (!known(value)) return NONE;
  let unit = 0;
  let size = Math.abs(value);
  while (size >= 1000 && unit < UNITS.length - 1) {
    size /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || size >= 100 ? 0 : size >= 10 ? 1 : 2;
  return `${value < 0 ? "−" : ""}${size.toFixed(digits)} ${UNITS[unit]}`;
}

/** A rate, in bytes a second. Next to nothing is 0. */
export function rate(value) {
  return known(value) ? `${bytes(value < 1 ? 0 : value)}/s` : NONE;
}

/** Processors in use. */
export function cores(value) {
  if (!known(value)) return NONE;
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export function percent(part) {
  return known(part) ? `${(part * 100).toFixed(part < 0.1 ? 1 : 0)} %` : NONE;
}

export function count(value) {
  return known(value) ? Math.round(value).toLocaleString("en").replaceAll(",", "\u202f") : NONE;
}

/** A length of time in its two largest units. */
export function duration(seconds) {
  if (!known(seconds)) return NONE;
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${String(whole % 60).padStart(2, "0")} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return `${hours} h ${String(minutes % 60).padStart(2, "0")} min`;
  return `${Math.floor(hours / 24)} d ${String(hours % 24).padStart(2, "0")} h`;
}

/** As short as a column of a table wants it: one unit. */
export function age(seconds) {
  if (!known(seconds)) return NONE;
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 120) return `${whole} s`;
  if (whole < 7200) return `${Math.floor(whole / 60)} min`;
  if (whole < 172800) return `${Math.floor(whole / 3600)} h`;
  return `${Math.floor(whole / 86400)} d`;
}

/** Milliseconds of a step. */
export function milliseconds(seconds) {
  if (!known(seconds)) return NONE;
  const ms = seconds * 1000;
  if (ms >= 1000) return `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
  return `${ms.toFixed(ms > 0 && ms < 10 ? 1 : 0)} ms`;
}

/** A point in time, whole: ISO 8601, UTC. */
export function moment(seconds) {
  if (!known(seconds) || Math.abs(seconds) > 8e12) return "";
  return new Date(seconds * 1000).toISOString().replace("T", " ").replace(/\.\d+Z$/, " UTC");
}

/** The time of day, local. */
export function clock(seconds) {
  if (!known(seconds) || Math.abs(seconds) > 8e12) return NONE;
  const at = new Date(seconds * 1000);
  return [at.getHours(), at.getMinutes(), at.getSeconds()].map((one) => String(one).padStart(2, "0")).join(":");
}
