// The end of a guest's console, or of a container's log: fetched again while it is looked at.

import { make, setAttribute, setText } from "./dom.js";
import { clean, cleanLines } from "./text.js";

const REFRESH_MS = 2000;
const DEADLINE_MS = 10000;
const SIZES = [
  [65536, "64 KiB"],
  [262144, "256 KiB"],
  [1048576, "1 MiB"],
];

export class Text {
  constructor(view, what) {
    this.view = view;
    this.what = what;
    this.fetched = -Infinity;
    this.from = "";
    this.raw = null;
    this.names = "";
    this.follow = make("input", { type: "checkbox", checked: true });
    this.wrap = make("input", { type: "checkbox", checked: true, onchange: () => this.text.classList.toggle("wrap", this.wrap.checked) });
    this.size = make("select", { onchange: () => this.again() }, ...SIZES.map(([bytes, title]) => make("option", { value: String(bytes) }, title)));
    this.container = make("select", { onchange: () => this.view.set({ container: this.container.value }) });
    this.link = make("a.action", { target: "_blank", rel: "noopener" }, "As plain text");
    this.problem = make("p.problem", { role: "status", hidden: true });
    this.text = make("pre.text.wrap", { tabindex: "0", role: "region", "aria-label": what === "console" ? "The guest's console" : "The container's log" });
    this.element = make(
      "div.tail",
      {},
      make(
        "div.toolbar",
        {},
        what === "logs" ? make("label", {}, make("span", {}, "Container"), this.container) : null,
        make("label", {}, make("span", {}, "The last"), this.size),
        make("label.check", {}, this.follow, "Follow"),
        make("label.check", {}, this.wrap, "Wrap lines"),
        this.link,
      ),
      this.problem,
      this.text,
    );
  }

  again() {
    this.fetched = -Infinity;
    this.wanted?.();
  }

  close() {
    this.abort?.abort();
    this.abort = null;
  }

  draw(sandbox, now, live) {
    this.wanted = () => this.draw(sandbox, now, live);
    const address = this.address(sandbox);
    if (!address) {
      this.link.hidden = true;
      this.tell("No container yet.");
      return;
    }
    this.link.hidden = false;
    setAttribute(this.link, "href", address);
    if (address !== this.from) {
      this.close();
      this.from = address;
      this.fetched = -Infinity;
      this.raw = null;
      setText(this.text, "");
    }
    const first = this.fetched === -Infinity;
    const due = live && this.follow.checked && performance.now() - this.fetched > REFRESH_MS * 0.9;
    if (this.abort || !(first || due)) return;
    void this.fetch(address);
  }

  address(sandbox) {
    const base = `api/v1/sandboxes/${encodeURIComponent(sandbox.id)}`;
    if (this.what === "console") return `${base}/console?tail=${this.size.value}`;
    const containers = [...sandbox.containers.values()].map((one) => one.now).filter((one) => one.id);
    const names = JSON.stringify(containers.map((one) => [one.id, one.name]));
    if (names !== this.names) {
      this.names = names;
      this.container.replaceChildren(...containers.map((one) => make("option", { value: one.id }, one.name)));
    }
    if (!containers.length) return "";
    const chosen = containers.some((one) => one.id === this.view.container) ? this.view.container : containers[0].id;
    if (this.container.value !== chosen) this.container.value = chosen;
    return `${base}/logs?container=${encodeURIComponent(chosen)}&tail=${this.size.value}`;
  }

  async fetch(address) {
    const abort = new AbortController();
    this.abort = abort;
    const timer = setTimeout(() => abort.abort(), DEADLINE_MS);
    this.fetched = performance.now();
    try {
      const answer = await fetch(address, { signal: abort.signal, cache: "no-store" });
      const text = (await answer.text()).slice(-(2 << 20));
      if (this.abort !== abort) return;
      if (answer.ok) this.show(text);
      else this.tell(`The sandbox does not say: ${reason(text) || `status ${answer.status}`}`);
    } catch (error) {
      if (this.abort === abort) this.tell(error.name === "AbortError" ? "No answer within 10 s." : "The monitor does not answer.");
    } finally {
      clearTimeout(timer);
      if (this.abort === abort) this.abort = null;
    }
  }

  show(text) {
    this.tell("");
    if (text === this.raw) return;
    this.raw = text;
    const { text: box } = this;
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    setText(box, text ? cleanLines(text).join("\n") : "");
    if (!text) this.tell("Nothing was said yet.");
    if (atEnd) box.scrollTop = box.scrollHeight;
  }

  tell(what) {
    setText(this.problem, what);
    this.problem.hidden = !what;
  }
}

function reason(text) {
  try {
    const { error, hint } = JSON.parse(text);
    return [clean(error, 300), clean(hint, 200)].filter(Boolean).join("; ");
  } catch {
    return clean(text, 300);
  }
}
