// Numbers and texts as people read them. All texts of guests and clients go through `clean`.

const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu;

/** A text that may be hostile: what cannot be seen, or turns others around, is written out; bounded. */
export function clean(value, most = 200) {
  const text = typeof value === "string" ? value : value == null ? "" : String(value);
  const cut = text.length > most ? `${text.slice(0, most - 1)}…` : text;
  return cut.replace(HIDDEN, (char) => `\\u{${char.codePointAt(0).toString(16)}}`);
}

/** The same for text of several lines: line ends and tabs stay. */
export function cleanLines(value, most = 1 << 20) {
  const text = String(value ?? "").replace(/\r\n?/g, "\n");
  const cut = text.length > most ? text.slice(-most) : text;
  return cut.replace(HIDDEN, (char) =>
    char === "\n" || char === "\t" ? char : `\\u{${char.codePointAt(0).toString(16)}}`);
}

export const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** Bytes with a unit and three digits. */
export function bytes(value) {
  let left = number(value);
  if (left === null) return "–";
  let unit = 0;
  while (left >= 999.5 && unit < UNITS.length - 1) {
    left /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || left >= 99.95 ? 0 : left >= 9.995 ? 1 : 2;
  return `${left.toFixed(digits)} ${UNITS[unit]}`;
}

/** Bytes a second. */
export const rate = (value) => (number(value) === null ? "–" : `${bytes(value)}/s`);

/** Processors: 1.00 is one processor, wholly in use. */
export const processors = (value) => (number(value) === null ? "–" : value.toFixed(2));

export const percent = (value) => (number(value) === null ? "–" : `${(value * 100).toFixed(0)} %`);

/** Seconds, as long as they are short. */
export function duration(value) {
  const seconds = number(value);
  if (seconds === null) return "–";
  return seconds < 1 ? `${(seconds * 1000).toFixed(0)} ms` : `${seconds.toFixed(2)} s`;
}

/** How long ago, in the two largest units. */
export function age(seconds) {
  let left = number(seconds);
  if (left === null) return "–";
  left = Math.max(0, Math.floor(left));
  const parts = [];
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]]) {
    if (left >= size || (unit === "s" && !parts.length)) {
      parts.push(`${Math.floor(left / size)} ${unit}`);
      left %= size;
    } else if (parts.length) break;
    if (parts.length === 2) break;
  }
  return parts.join(" ");
}

/** A time (seconds of the epoch, or RFC 3339), in the reader's own zone. */
export function time(value) {
  const at = typeof value === "number" ? new Date(value * 1000) : new Date(String(value));
  return Number.isNaN(at.getTime()) ? clean(value, 40) : at.toLocaleString(undefined, { hour12: false });
}
