// The colour of a state. Each state is also a word: the colour alone says nothing.

const TONES = {
  ready: "good",
  running: "good",
  booting: "busy",
  created: "busy",
  closing: "busy",
  ending: "busy",
  paused: "busy",
  failed: "bad",
  unreachable: "bad",
  stopped: "quiet",
  ended: "quiet",
};

export const toneOf = (state) => TONES[state] ?? "quiet";

export function toneOfEvent(one) {
  const code = one.rest.find(([name]) => name === "exit_code")?.[1];
  if (/(failed|oom|error)$/.test(one.event)) return "bad";
  if (one.event.endsWith("exited") && code !== undefined && code !== "0") return "warn";
  if (/(ready|started|resumed)$/.test(one.event)) return "good";
  if (/(created|resized|paused)$/.test(one.event)) return "busy";
  return "quiet";
}
