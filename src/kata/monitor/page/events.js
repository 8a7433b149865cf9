// What happened, newest first.

import { make } from "./dom.js";
import * as format from "./format.js";
import { LiveTable } from "./live.js";
import { toneOfEvent } from "./tone.js";

const restOf = (one) => one.rest.map((pair) => pair.join("=")).join("  ");

export function eventsTable(store, view, ofOne) {
  const names = (id) => store.sandboxes.get(id)?.name ?? null;
  const columns = [
    { title: "When", number: true, text: (one) => format.clock(one.at), hint: (one) => format.moment(one.at) },
    { title: "Ago", number: true, text: (one) => (one.at === null ? format.NONE : format.age(store.now() - one.at)) },
    { title: "Event", text: (one) => one.event, tone: (one) => `badge ${toneOfEvent(one)}` },
    {
      title: "Sandbox",
      name: true,
      text: (one) => names(one.sandbox) ?? one.shownSandbox,
      hint: (one) => one.shownSandbox,
      link: (one) => (names(one.sandbox) === null ? null : view.href({ view: "sandboxes", open: one.sandbox, tab: "overview", container: "" })),
    },
    { title: "Container", name: true, text: (one) => one.container, hint: (one) => one.container },
    { title: "More", name: true, text: restOf, hint: restOf },
  ];
  return new LiveTable("Events, newest first", ofOne ? columns.filter((one) => one.title !== "Sandbox") : columns, "Nothing has happened yet.");
}

export class Events {
  constructor(store, view) {
    this.store = store;
    this.view = view;
    this.table = eventsTable(store, view, false);
    this.element = make("div.page", {}, make("h1", {}, "Events"), this.table.element);
    this.table.element.addEventListener("click", (event) => {
      const link = event.target.closest("a[href]");
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
      event.preventDefault();
      const query = new URLSearchParams(link.getAttribute("href"));
      this.view.set({ view: "sandboxes", open: query.get("open") ?? "", tab: "overview", container: "" }, true);
    });
  }

  draw() {
    this.table.draw(this.store.events.map((one) => [one.key, one]).reverse());
  }
}
