// What guests, labels and clients say is shown by these functions alone: bounded, and with nothing in it that the
// reader cannot see. It gets into the page as text nodes only, never as markup.

// Control, format (bidi overrides, zero widths, tags) and unassigned characters, separators that are no space,
// lone surrogates, and variation selectors. Of combining marks, more than two on one character.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}\u{115f}\u{1160}\u{2800}\u{3164}\u{ffa0}\u{fe00}-\u{fe0f}\u{e0100}-\u{e01ef}]/gu;
const PILED = /(\p{M}{2})(\p{M}+)/gu;
const COLOURS = /\x1b\[[0-9;:]*m/g;

function escaped(text) {
  let out = "";
  for (const character of text) {
    const code = character.codePointAt(0);
    out += code < 0x100 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u{${code.toString(16)}}`;
  }
  return out;
}

/** One line: at most `most` characters, what is unseen as escapes. Anything that is no text gives "". */
export function clean(value, most = 128) {
  if (typeof value === "number" || typeof value === "boolean") value = String(value);
  if (typeof value !== "string") return "";
  let text = value.length > most * 4 ? value.slice(0, most * 4) : value;
  text = text.replace(UNSEEN, escaped).replace(PILED, (_, two, rest) => two + escaped(rest));
  if (text.length <= most && value.length <= most * 4) return text;
  const points = Array.from(text);
  return points.length <= most && value.length <= most * 4 ? text : `${points.slice(0, most - 1).join("")}…`;
}

const LINE = 2000;
const LINES = 5000;

/** Lines of a console or log: terminal colours left out, other control characters as escapes, long lines cut. */
export function cleanLines(value) {
  const lines = String(value).replace(COLOURS, "").split(/\r*\n/);
  const kept = lines.length > LINES ? lines.slice(-LINES) : lines;
  return kept.map((line) =>
    line
      .split("\t")
      .map((part) => clean(part, LINE))
      .join("\t"),
  );
}
