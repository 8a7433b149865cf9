// Elements, made without ever reading text as markup.

/** An element: properties and attributes, then children (elements or texts). */
export function make(name, about = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(about)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") element.className = value;
    else if (key === "text") element.textContent = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Change a text only where it differs, so that nothing is drawn again and no selection is lost. */
export function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, about = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(about)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const WIDTH = 72;
const HEIGHT = 20;

/** A line of the last values; `redraw` takes new ones. The description is for those who do not see it. */
export class Sparkline {
  constructor(label) {
    this.label = label;
    this.line = svg("polyline", { class: "line" });
    this.area = svg("polygon", { class: "area" });
    this.element = svg("svg", {
      class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", preserveAspectRatio: "none", "aria-label": label,
    }, this.area, this.line);
  }

  redraw(values, most, shown) {
    const known = values.map((value) => value ?? 0);
    const top = Math.max(most, ...known) || 1;
    const step = known.length > 1 ? WIDTH / (known.length - 1) : WIDTH;
    const points = known
      .map((value, index) => `${(index * step).toFixed(1)},${(HEIGHT - 1 - (value / top) * (HEIGHT - 2)).toFixed(1)}`);
    if (points.length === 1) points.push(`${WIDTH},${points[0].split(",")[1]}`);
    this.line.setAttribute("points", points.join(" "));
    this.area.setAttribute("points", points.length ? `0,${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}` : "");
    this.element.setAttribute("aria-label", `${this.label}: now ${shown}`);
  }
}
