// What all panels share: the colour of a model, the tone of a state, bars, and where a figure stands in a model's record.

import { attribute, el, keyed, say } from "./dom.js";

const TONES = {
  ready: "good",
  failed: "bad",
  broken: "bad",
  draining: "warn",
  unloading: "warn",
  stopped: "warn",
  cancelled: "warn",
  done: "good",
  decode: "good",
  "on disk": "none",
};
/** Whatever is on its way: loading, waiting, restarting, queued, running … */
export const tone = (state) => TONES[state] ?? "busy";

const COLOURS = 6;
const colours = new Map();
/** A model keeps its colour as long as the page lives. */
export function colour(id) {
  if (!colours.has(id)) colours.set(id, colours.size % COLOURS);
  return colours.get(id);
}

/** A word with a dot in its tone's colour. */
export function state(element, name) {
  attribute(element, "class", `state ${tone(name)}`);
  say(element, name);
}

/** A bar of parts, each a share of the whole, and marks on it. */
export function bar(element, parts, marks = []) {
  keyed(
    element,
    [...parts.filter((part) => part.share > 0), ...marks],
    (part) => part.key,
    () => el("i"),
    (piece, part) => {
      attribute(piece, "class", part.class);
      attribute(piece, "title", part.title);
      if (part.at === undefined) piece.style.width = `${Math.min(100, part.share * 100)}%`;
      else piece.style.left = `${Math.min(100, part.at * 100)}%`;
    },
  );
}

// Of a model, as /admin/status or /admin/models tells it.
export const engineOf = (model) => model.engine ?? {};
export const ownedOf = (model) => model.owned_bytes || model.memory?.owned_bytes || null;
export const measuredOf = (model) =>
  model.measured_bytes || model.memory?.measured_bytes || engineOf(model).engine?.rss_bytes || null;
export const neededOf = (model) => model.needed_bytes || model.memory?.estimate?.total_bytes || null;
export const requestsOf = (model) => engineOf(model).live_leases ?? model.leases ?? 0;
