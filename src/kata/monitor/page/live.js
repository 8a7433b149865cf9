// A table whose rows stay where they are while their figures change, so that text in it can be marked and copied.

import { arrange, make, setAttribute, setClass, setText } from "./dom.js";

export class LiveTable {
  /**
   * @param {string} caption For screen readers.
   * @param {object[]} columns `{title, text(row), number, name, hint(row), tone(row), link(row)}`
   * @param {string} empty What is said when there are no rows.
   */
  constructor(caption, columns, empty = "none") {
    this.columns = columns;
    this.rows = new Map();
    this.body = make("tbody");
    this.table = make(
      "table.live",
      {},
      make("caption.hidden", {}, caption),
      make("thead", {}, make("tr", {}, ...columns.map((one) => make(one.number ? "th.number" : "th", { scope: "col" }, one.title)))),
      this.body,
    );
    this.scroll = make("div.scroll", { tabindex: "0", role: "region", "aria-label": caption }, this.table);
    this.empty = make("p.quiet", {}, empty);
    this.element = make("div", {}, this.scroll, this.empty);
  }

  /** `rows`: `[key, value]`, keys once each. */
  draw(rows) {
    this.scroll.hidden = rows.length === 0;
    this.empty.hidden = rows.length > 0;
    const there = new Set();
    const elements = rows.map(([key, value]) => {
      there.add(key);
      if (!this.rows.has(key)) this.rows.set(key, this.make());
      const { element, cells } = this.rows.get(key);
      this.columns.forEach((column, place) => {
        const where = cells[place];
        setText(where, column.text(value));
        if (column.hint) setAttribute(where, "title", column.hint(value) || null);
        if (column.tone) setClass(where, column.tone(value));
        if (column.link) setAttribute(where, "href", column.link(value));
      });
      return element;
    });
    for (const key of this.rows.keys()) if (!there.has(key)) this.rows.delete(key);
    arrange(this.body, elements);
  }

  make() {
    const cells = this.columns.map((column) => make(column.link ? "a" : column.tone ? "span" : "bdi"));
    const element = make(
      "tr",
      {},
      ...this.columns.map((column, place) => make(column.number ? "td.number" : column.name ? "td.name" : "td", {}, cells[place])),
    );
    return { element, cells };
  }
}
