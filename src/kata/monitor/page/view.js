// What is shown, as it stands in the address: a view can be sent as a link, and the browser's back button works.

const DEFAULTS = {
  view: "sandboxes",
  q: "",
  show: "all",
  sort: "problems",
  order: "",
  containers: "yes",
  open: "",
  tab: "overview",
  container: "",
};
const ALLOWED = {
  view: ["sandboxes", "events"],
  sort: ["problems", "name", "state", "age", "cpu", "memory", "overhead", "returned", "network", "disk"],
  order: ["", "up", "down"],
  containers: ["yes", "no"],
  tab: ["overview", "start", "events", "console", "logs"],
};

export class View {
  constructor(changed) {
    this.changed = changed;
    this.read();
    window.addEventListener("popstate", () => {
      this.read();
      this.changed("history");
    });
  }

  read() {
    const query = new URLSearchParams(location.search);
    for (const [name, usual] of Object.entries(DEFAULTS)) {
      const value = (query.get(name) ?? usual).slice(0, 512);
      this[name] = ALLOWED[name] && !ALLOWED[name].includes(value) ? usual : value;
    }
  }

  /** The address of this view with some things changed. */
  href(changes = {}) {
    const query = new URLSearchParams();
    for (const [name, usual] of Object.entries(DEFAULTS)) {
      const value = changes[name] ?? this[name];
      if (value !== usual) query.set(name, value);
    }
    const text = query.toString();
    return text ? `?${text}` : location.pathname;
  }

  /** `step`: whether the back button is to lead back here. */
  set(changes, step = false) {
    const href = this.href(changes);
    Object.assign(this, changes);
    if (step) history.pushState(null, "", href);
    else history.replaceState(null, "", href);
    this.changed(step ? "step" : "change");
  }
}
