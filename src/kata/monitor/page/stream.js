// The connection to the monitor: open while somebody looks, closed while the tab is in the background, and opened
// again when it breaks, with what is going on told to the page.

const RETRY_S = [1, 2, 4, 8, 15];

export class Stream {
  /**
   * @param {object} heard `snapshot(object)`, `life(object)` and `state(name, detail)`: "connecting", "live", "lost"
   *   (with the seconds until the next try), "late" (with the seconds of silence) or "paused".
   * @param {number} interval Seconds between two samples.
   */
  constructor(heard, interval) {
    this.heard = heard;
    this.interval = interval;
    this.source = null;
    this.failures = 0;
    this.retryAt = 0;
    this.last = 0;
    this.paused = false;
    document.addEventListener("visibilitychange", () => this.look());
    window.addEventListener("online", () => this.retryNow());
    window.addEventListener("pagehide", () => this.close());
    window.addEventListener("pageshow", () => this.look());
    setInterval(() => this.tick(), 500);
    this.look();
  }

  look() {
    const wanted = !this.paused && document.visibilityState === "visible";
    if (wanted && !this.source) this.open();
    if (!wanted) {
      this.close();
      this.retryAt = 0;
      this.heard.state("paused");
    }
  }

  pause(on) {
    this.paused = on;
    this.look();
  }

  retryNow() {
    if (this.retryAt) this.open();
  }

  open() {
    this.close();
    this.retryAt = 0;
    if (!this.failures) this.heard.state("connecting");
    const source = new EventSource(`api/v1/stream?interval=${this.interval}`);
    this.source = source;
    this.last = performance.now();
    source.addEventListener("snapshot", (event) => {
      if (this.source !== source) return;
      const whole = parsed(event.data);
      if (!whole) return;
      this.failures = 0;
      this.last = performance.now();
      this.heard.state("live");
      this.heard.snapshot(whole);
    });
    source.addEventListener("life", (event) => {
      const one = parsed(event.data);
      if (this.source === source && one) this.heard.life(one);
    });
    // The browser's own tries end for good when the answer is an error; ours do not, and can be seen.
    source.addEventListener("error", () => {
      if (this.source === source) this.lose();
    });
  }

  lose() {
    this.close();
    const wait = RETRY_S[Math.min(this.failures, RETRY_S.length - 1)];
    this.failures += 1;
    this.retryAt = performance.now() + wait * 1000;
    this.heard.state("lost", wait);
  }

  close() {
    this.source?.close();
    this.source = null;
  }

  tick() {
    const now = performance.now();
    if (this.retryAt) {
      if (now >= this.retryAt) this.open();
      else this.heard.state("lost", Math.ceil((this.retryAt - now) / 1000));
    } else if (this.source) {
      const silent = (now - this.last) / 1000;
      // A sampling may take as long as the monitor's deadline for a stuck sandbox.
      if (silent > 30) this.lose();
      else if (silent > this.interval + 8) this.heard.state("late", Math.floor(silent));
    }
  }
}

function parsed(text) {
  try {
    const value = JSON.parse(text);
    return value && typeof value === "object" ? value : null;
  } catch {
    return null;
  }
}
