// Lines of the last minutes, and the waterfall of a start.

import { make, setAttribute, setText, svg } from "./dom.js";
import * as format from "./format.js";
import { KEPT } from "./store.js";

function path(values, width, height, top, fill) {
  const step = width / (KEPT - 1);
  const from = KEPT - values.length;
  let out = "";
  let started = null;
  const close = (x) => {
    if (fill && started !== null) out += `L${x.toFixed(1)} ${height}L${started.toFixed(1)} ${height}Z`;
    started = null;
  };
  let last = 0;
  values.forEach((value, place) => {
    const x = (from + place) * step;
    if (value === null) {
      close(last);
      return;
    }
    const y = height - Math.min(1, value / top) * height;
    if (started === null) {
      // A single point is a short line, or it could not be seen.
      out += `M${Math.max(0, x - step).toFixed(1)} ${y.toFixed(1)}L${x.toFixed(1)} ${y.toFixed(1)}`;
      started = Math.max(0, x - step);
    } else out += `L${x.toFixed(1)} ${y.toFixed(1)}`;
    last = x;
  });
  close(last);
  return out;
}

const largest = (...series) => series.reduce((most, values) => values.reduce((one, value) => (value !== null && value > one ? value : one), most), 0);

/** A small line without axes, beside a number that says the same: hidden from screen readers. */
export class Sparkline {
  constructor(width = 72, height = 20) {
    this.width = width;
    this.height = height;
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    this.element = svg(
      "svg",
      { class: "spark", width, height: height + 2, viewBox: `0 -1 ${width} ${height + 2}`, "aria-hidden": "true", preserveAspectRatio: "none" },
      this.area,
      this.line,
    );
  }

  draw(values, ceiling = 0) {
    const top = Math.max(ceiling, largest(values) * 1.1) || 1;
    setAttribute(this.line, "d", path(values, this.width, this.height, top, false));
    setAttribute(this.area, "d", path(values, this.width, this.height, top, true));
  }
}

/** A chart with a scale: one or two lines, the present values in its legend. */
export class Chart {
  /**
   * @param {string} title
   * @param {string[]} names The lines; the second goes in another colour and dashed.
   * @param {function} say How a value is written.
   */
  constructor(title, names, say) {
    this.say = say;
    this.width = 480;
    this.height = 96;
    this.lines = names.map((_, place) => svg("path", { class: `line series-${place}` }));
    this.area = svg("path", { class: "area" });
    const grid = [0, 0.5, 1].map((part) =>
      svg("line", { class: "grid", x1: 0, x2: this.width, y1: this.height * part, y2: this.height * part }),
    );
    this.drawing = svg(
      "svg",
      { class: "plot", viewBox: `0 -2 ${this.width} ${this.height + 4}`, preserveAspectRatio: "none", "aria-hidden": "true" },
      ...grid,
      this.area,
      ...this.lines,
    );
    this.top = make("span.scale");
    this.now = names.map(() => make("strong.number"));
    this.legend = make(
      "p.legend",
      {},
      ...names.map((name, place) => make("span", {}, make(`i.key.series-${place}`, { "aria-hidden": "true" }), `${name} `, this.now[place])),
    );
    this.span = make("span.span");
    this.element = make(
      "section.chart",
      { "aria-label": title },
      make("header", {}, make("h2", {}, title), this.legend),
      make("div.frame", {}, this.top, this.drawing),
      make("footer", {}, this.span, make("span", {}, "now")),
    );
  }

  draw(series, interval, ceiling = 0) {
    const top = Math.max(ceiling, largest(...series) * 1.15) || 1;
    series.forEach((values, place) => {
      setAttribute(this.lines[place], "d", path(values, this.width, this.height, top, false));
      setText(this.now[place], this.say(values.at(-1) ?? null));
    });
    setAttribute(this.area, "d", path(series[0], this.width, this.height, top, true));
    setText(this.top, this.say(top));
    setText(this.span, `${format.age(KEPT * interval)} ago`);
  }
}

/** The steps of a start, one below the other, each where it was in time. */
export function waterfall(timings) {
  const begin = Math.min(...timings.map((one) => one.start));
  const end = Math.max(...timings.map((one) => one.start + one.duration));
  const whole = Math.max(end - begin, 1e-6);
  const longest = Math.max(...timings.map((one) => one.duration));
  const rows = timings.map((one) => {
    const bar = make(one.duration === longest ? "span.bar.longest" : "span.bar");
    bar.style.left = `${(((one.start - begin) / whole) * 100).toFixed(3)}%`;
    bar.style.width = `${((one.duration / whole) * 100).toFixed(3)}%`;
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, make("bdi", {}, one.name)),
      make("td.track", {}, make("span.lane", { "aria-hidden": "true" }, bar)),
      make("td.number", {}, format.milliseconds(one.start - begin)),
      make("td.number", {}, format.milliseconds(one.duration)),
    );
  });
  const marks = [0, 0.25, 0.5, 0.75].map((part) => make("span", {}, format.milliseconds(whole * part)));
  return make(
    "table.waterfall",
    {},
    make("caption.hidden", {}, "Steps of the start"),
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        make("th", { scope: "col" }, "Step"),
        make("th.axis", { scope: "col" }, make("span.hidden", {}, "When"), make("span.marks", { "aria-hidden": "true" }, ...marks)),
        make("th.number", { scope: "col" }, "Begin"),
        make("th.number", { scope: "col" }, "Took"),
      ),
    ),
    make("tbody", {}, ...rows),
  );
}
