// The page: what arrives from the monitor, what the address says, and who shows it.

import { make, put } from "./dom.js";
import { bytes, clean, processors, rate } from "./format.js";
import { Detail, eventItem } from "./detail.js";
import { Model } from "./model.js";
import { COLUMNS, Table } from "./table.js";

const INTERVAL_S = 2;
const AGAIN_MS = 3000;
const EVENTS = 200;
const $ = (id) => document.getElementById(id);

// ---- the view, which is in the address, so that it can be sent ----

const view = { filter: "", show: "all", sort: "state", descending: true, id: null, tab: "overview" };

function readAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  view.filter = said.get("q") ?? "";
  view.show = ["all", "trouble", "pods"].includes(said.get("show")) ? said.get("show") : "all";
  view.sort = COLUMNS.some(({ key }) => key === said.get("sort")) ? said.get("sort") : "state";
  view.descending = said.has("sort") ? said.get("order") === "desc" : true;
  view.id = said.get("id");
  view.tab = said.get("tab") ?? "overview";
}

function writeAddress() {
  const said = new URLSearchParams();
  if (view.filter) said.set("q", view.filter);
  if (view.show !== "all") said.set("show", view.show);
  if (view.sort !== "state" || !view.descending) {
    said.set("sort", view.sort);
    said.set("order", view.descending ? "desc" : "asc");
  }
  if (view.id) {
    said.set("id", view.id);
    if (view.tab !== "overview") said.set("tab", view.tab);
  }
  history.replaceState(null, "", said.size ? `#${said}` : location.pathname);
}

// ---- what is shown ----

const model = new Model();
let events = [];
let arrived = false;
const detail = new Detail($("detail"), (id, tab) => {
  view.id = id;
  view.tab = tab ?? "overview";
  writeAddress();
});
const open = (id, tab = "overview") => detail.open(id, tab, model.rows.get(id));
const table = new Table($("rows"), open);

function showTotals() {
  const total = model.totals();
  put($("total-sandboxes"), String(total.sandboxes));
  put($("total-states"), [...total.states].sort().map(([state, count]) => `${count} ${state}`).join(", "));
  put($("total-cpu"), processors(total.cpu));
  put($("total-cpu-note"), `${processors(total.containerCpu)} by containers`);
  put($("total-memory"), bytes(total.memory));
  put($("total-overhead"), bytes(total.overhead));
  put($("total-returned"), bytes(total.returned));
  put($("total-network"), `${rate(total.received)} / ${rate(total.sent)}`);
  put($("node"), model.node ? `on ${model.node}` : "");
  document.title = `${total.sandboxes} sandboxes${model.node ? ` on ${model.node}` : ""}`;
}

function showTrouble() {
  const bad = [...model.rows.values()].filter((row) => row.weight > 1).sort((one, other) => other.weight - one.weight);
  const shown = bad.slice(0, 6);
  const key = JSON.stringify(shown.map((row) => [row.id, row.title, row.troubles[0]]).concat(bad.length));
  if (showTrouble.key === key) return;
  showTrouble.key = key;
  $("trouble").hidden = !bad.length;
  $("trouble").replaceChildren(
    make("h2", { text: `${bad.length} ${bad.length === 1 ? "sandbox needs" : "sandboxes need"} attention` }),
    make("ul", {}, ...shown.map((row) => make("li", { "data-weight": String(row.weight) },
      make("button", { type: "button", class: "name", text: row.title, onclick: () => open(row.id) }),
      make("span", { text: row.troubles[0][1] })))),
    bad.length > shown.length ? make("p", { class: "note", text: `and ${bad.length - shown.length} more` }) : "");
}

function show() {
  if (!arrived) return;
  const shown = table.show(model, view);
  const all = model.rows.size;
  $("sandboxes").hidden = !shown;
  $("empty").hidden = all > 0;
  $("nothing").hidden = all === 0 || shown > 0;
  put($("count"), shown === all ? `${all} shown` : `${shown} of ${all} shown`);
  showTotals();
  showTrouble();
  if (detail.id !== null) detail.show(model.rows.get(detail.id));
}

function showEvents() {
  $("no-events").hidden = events.length > 0;
  $("events").replaceChildren(...events.slice(0, 50).map((event) => eventItem(event, true)));
  detail.tell(events);
}

function showView() {
  $("filter").value = view.filter;
  $("show").value = view.show;
  $("sort").value = view.sort;
  put($("direction"), view.descending ? "descending" : "ascending");
  for (const head of $("heads").children) {
    head.setAttribute("aria-sort", head.dataset.key !== view.sort ? "none" : view.descending ? "descending" : "ascending");
  }
}

function change(changes) {
  Object.assign(view, changes);
  writeAddress();
  showView();
  show();
}

function sortBy(key) {
  const column = COLUMNS.find((one) => one.key === key);
  change({ sort: key, descending: view.sort === key ? !view.descending : Boolean(column.largest) });
}

// ---- what arrives ----

let source = null;
let again = 0;

function connection(state, text) {
  $("connection").dataset.state = state;
  put($("connection"), text);
}

function take(event, use) {
  let said;
  try {
    said = JSON.parse(event.data);
  } catch {
    return; // of no use; the next one comes
  }
  if (said && typeof said === "object") use(said);
}

function connect() {
  clearTimeout(again);
  source?.close();
  source = new EventSource(`/api/v1/stream?interval=${INTERVAL_S}`);
  source.addEventListener("open", () => {
    connection("live", "live");
    loadEvents();
  });
  source.addEventListener("snapshot", (event) => take(event, (said) => {
    model.take(said);
    arrived = true;
    connection("live", "live");
    show();
    if (view.id !== null && detail.id === null) open(view.id, view.tab);
  }));
  source.addEventListener("life", (event) => take(event, (said) => {
    events = [said, ...events].slice(0, EVENTS);
    showEvents();
  }));
  source.addEventListener("error", () => {
    connection("lost", arrived ? "connection lost: the figures are old" : "the monitor does not answer");
    if (source.readyState === EventSource.CLOSED) again = setTimeout(connect, AGAIN_MS);
  });
}

async function loadEvents() {
  try {
    const answer = await fetch(`/api/v1/events?limit=${EVENTS}`);
    if (!answer.ok) return;
    const said = await answer.json();
    const list = Array.isArray(said) ? said : said.events;
    events = list.filter((one) => one && typeof one === "object").reverse().slice(0, EVENTS);
    showEvents();
  } catch {
    // The stream says that the connection is lost.
  }
}

// A page that nobody sees has nothing measured for it.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    clearTimeout(again);
    source?.close();
    source = null;
    connection("waiting", "paused in the background");
  } else if (!source) connect();
});

// ---- light and dark ----

const THEMES = ["system", "light", "dark"];

function setTheme(name) {
  const theme = THEMES.includes(name) ? name : "system";
  document.documentElement.dataset.theme = theme;
  put($("theme-name"), theme);
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // Kept for this visit only.
  }
}

function storedTheme() {
  try {
    return localStorage.getItem("theme");
  } catch {
    return null;
  }
}

// ---- start ----

for (const { key, title, number } of COLUMNS) {
  $("heads").append(make("th", { scope: "col", "data-key": key, class: number ? "number" : null },
    make("button", { type: "button", text: title, onclick: () => sortBy(key) })));
  $("sort").append(make("option", { value: key, text: title }));
}
$("filter").addEventListener("input", (event) => change({ filter: clean(event.target.value, 200) }));
$("show").addEventListener("change", (event) => change({ show: event.target.value }));
$("sort").addEventListener("change", (event) => sortBy(event.target.value));
$("direction").addEventListener("click", () => change({ descending: !view.descending }));
$("clear").addEventListener("click", () => change({ filter: "", show: "all" }));
$("tools").addEventListener("submit", (event) => event.preventDefault());
$("theme").addEventListener("click", () =>
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]));
addEventListener("hashchange", () => {
  readAddress();
  showView();
  show();
  if (view.id !== null && view.id !== detail.id) open(view.id, view.tab);
});
setTheme(storedTheme());
readAddress();
showView();
if (!document.hidden) connect();
