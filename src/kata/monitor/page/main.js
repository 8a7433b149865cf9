// The page: what is heard from the monitor goes into the store, and what is in the store gets drawn.

import { Detail } from "./detail.js";
import { setAttribute, setText } from "./dom.js";
import { Events } from "./events.js";
import * as format from "./format.js";
import { List } from "./list.js";
import { problemsOf } from "./problems.js";
import { Store } from "./store.js";
import { Stream } from "./stream.js";
import { View } from "./view.js";

const INTERVAL_S = 2;
const byId = (id) => document.getElementById(id);
const [main, connection, connectionText, lost, lostText, spoken] = ["main", "connection", "connection-text", "lost", "lost-text", "spoken"].map(byId);

const store = new Store();
const view = new View((why) => draw(true, why));
const list = new List(store, view);
const events = new Events(store, view);
let detail = null;
let shown = null;
let state = "";
let heard = 0;
let held = false;
let waiting = 0;

// ---- drawing ----

function draw(asked = false, why = "") {
  cancelAnimationFrame(waiting);
  waiting = 0;
  setAttribute(byId("to-sandboxes"), "aria-current", view.view === "sandboxes" ? "page" : null);
  setAttribute(byId("to-events"), "aria-current", view.view === "events" ? "page" : null);
  if (!store.known) return;
  setText(byId("node"), store.node);
  byId("brand").title = `kata ${store.version}`;
  const now = store.now();
  const came = detail?.id;
  if (detail && (view.view !== "sandboxes" || detail.id !== view.open)) {
    detail.close();
    detail = null;
  }
  const opened = view.view === "sandboxes" && view.open && !detail;
  if (opened) detail = new Detail(store, view, INTERVAL_S);
  const what = view.view === "events" ? events : (detail ?? list);
  const changed = what !== shown;
  if (changed) {
    main.replaceChildren(what.element);
    shown = what;
  }
  if (what === list) {
    const problems = new Map([...store.sandboxes.values()].map((one) => [one.id, problemsOf(one, now)]));
    const wrong = [...problems.values()].filter((one) => one.length).length;
    document.title = `${wrong ? `(${wrong}) ` : ""}${store.node || "kata"} · kata`;
    list.draw(problems, asked);
  } else if (what === detail) {
    const sandbox = store.sandboxes.get(detail.id);
    detail.draw(sandbox ? problemsOf(sandbox, now) : [], state === "live");
  } else {
    document.title = `Events · ${store.node || "kata"}`;
    events.draw();
  }
  if (changed && (why === "step" || why === "history")) {
    if (what === detail) {
      detail.focus();
      scrollTo(0, 0);
    } else if (what === list && came !== undefined) list.focus(came);
  }
}

function drawSoon() {
  if (!waiting && !held) waiting = requestAnimationFrame(() => draw());
}

// ---- the connection ----

const SAID = { connecting: "Connecting", live: "Live", late: "Waiting", lost: "Connection lost", paused: "Held" };

function connectionIs(name, detailS) {
  if (name !== state) {
    if (name === "lost" || (name === "live" && state === "lost")) setText(spoken, name === "lost" ? "Connection lost" : "Connected again");
    if (name === "live") void fetchEvents();
    if (state === "live" && name !== "late") store.gap();
    state = name;
    connection.dataset.state = name;
    setText(connectionText, SAID[name]);
    document.body.classList.toggle("old", name === "lost" || name === "late");
  }
  lost.hidden = name !== "lost" && name !== "late";
  if (lost.hidden) return;
  const old = heard ? `The figures are ${format.age((performance.now() - heard) / 1000)} old.` : "";
  setText(
    lostText,
    name === "late" ? `Nothing was heard from the monitor for ${detailS} s. ${old}` : `The connection to the monitor is lost; next try in ${detailS} s. ${old}`,
  );
  if (!store.known) setText(byId("waiting"), "The monitor does not answer.");
}

async function fetchEvents() {
  try {
    const answer = await fetch("api/v1/events?limit=500", { cache: "no-store" });
    if (!answer.ok) return;
    const found = await answer.json();
    store.addEvents(Array.isArray(found) ? found : found?.events, true);
    drawSoon();
  } catch {
    // without those of before there are still those that come
  }
}

const stream = new Stream(
  {
    snapshot(whole) {
      heard = performance.now();
      store.snapshot(whole);
      drawSoon();
    },
    life(one) {
      store.addEvents([one]);
      drawSoon();
    },
    state: connectionIs,
  },
  INTERVAL_S,
);

// ---- what can be clicked and typed ----

function follow(id, changes) {
  byId(id).addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
    event.preventDefault();
    view.set(changes, true);
  });
}
follow("brand", { view: "sandboxes", open: "", q: "", show: "all", tab: "overview", container: "" });
follow("to-sandboxes", { view: "sandboxes", open: "", tab: "overview", container: "" });
follow("to-events", { view: "events", open: "", tab: "overview", container: "" });
byId("retry").addEventListener("click", () => stream.retryNow());

const pause = byId("pause");
pause.addEventListener("click", () => {
  held = !held;
  setAttribute(pause, "aria-pressed", String(held));
  pause.querySelector("use").setAttribute("href", `icons.svg#${held ? "play" : "pause"}`);
  stream.pause(held);
});

const THEMES = { auto: "as the system", light: "light", dark: "dark" };
const theme = byId("theme");
function drawTheme() {
  const name = window.kataTheme.get();
  theme.querySelector("use").setAttribute("href", `icons.svg#${name}`);
  setText(byId("theme-text"), `Theme: ${THEMES[name]}`);
  theme.title = `Theme: ${THEMES[name]}`;
}
theme.addEventListener("click", () => {
  const names = Object.keys(THEMES);
  window.kataTheme.set(names[(names.indexOf(window.kataTheme.get()) + 1) % names.length]);
  drawTheme();
});
drawTheme();

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest?.("input, select, textarea");
  if (event.key === "/" && !typing && shown === list) {
    event.preventDefault();
    list.filter.focus();
  } else if (event.key === "Escape" && detail && !typing) view.set({ open: "", tab: "overview", container: "" }, true);
  else if (event.key === "Escape" && typing === list.filter) {
    list.filter.blur();
    view.set({ q: "" });
  }
});

// Ages go on while nothing arrives.
setInterval(() => {
  if (state !== "live" && document.visibilityState === "visible") drawSoon();
}, 1000);

draw();
