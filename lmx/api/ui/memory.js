// One panel: where the machine's memory is.

import { byId, el, keyed, say, sayOrHide } from "./dom.js";
import { bar, colour, measuredOf, ownedOf } from "./marks.js";
import * as words from "./words.js";

/** The machine's memory: each model, this server, everything else; the budget as a mark. */
export function memory(status) {
  const panel = byId("memory");
  if (!panel.parts) {
    panel.parts = {
      figure: el("p", { class: "figure" }),
      bar: el("div", { class: "bar tall", "aria-hidden": "true" }),
      legend: el("ul", { class: "legend" }),
      note: el("p", { class: "quiet note" }),
      alarm: el("p", { class: "message bad" }),
    };
    panel.append(...Object.values(panel.parts));
  }
  const { parts } = panel;
  const figures = status.memory ?? {};
  const total = figures.total_bytes || 1;
  const pieces = status.models.map((model) => ({
    key: model.id,
    bytes: measuredOf(model) ?? ownedOf(model) ?? 0,
    class: `c${colour(model.id)}`,
  }));
  pieces.push({ key: "server", label: "lmx itself", bytes: figures.server_rss_bytes ?? 0, class: "self" });
  const ours = pieces.reduce((all, piece) => all + piece.bytes, 0);
  const others = Math.max(0, total - (figures.available_bytes ?? total) - ours);
  pieces.push({ key: "others", label: "other programs", bytes: others, class: "others" });
  const budget = figures.budget_bytes;
  say(parts.figure, `${words.bytes(figures.available_bytes)} free`);
  bar(
    parts.bar,
    pieces.map((piece) => ({
      ...piece,
      share: piece.bytes / total,
      title: `${piece.label ?? piece.key}: ${words.bytes(piece.bytes)}`,
    })),
    budget ? [{ key: "budget", at: budget / total, class: "tick", title: `budget: ${words.bytes(budget)}` }] : [],
  );
  keyed(
    parts.legend,
    pieces.filter((piece) => piece.bytes),
    (piece) => piece.key,
    (piece) =>
      el(
        "li",
        {},
        el("i", { class: `swatch ${piece.class}` }),
        el("span", { class: "name" }, piece.label ?? piece.key),
        el("b"),
      ),
    (row, piece) => say(row.lastElementChild, words.bytes(piece.bytes)),
  );
  say(
    parts.note,
    words.list(
      `of ${words.bytes(figures.total_bytes)}`,
      budget ? `models may take ${words.bytes(budget)}` : "",
      figures.owned_bytes != null ? `${words.bytes(figures.owned_bytes)} owned` : "",
      status.disk?.free_bytes != null ? `${words.bytes(status.disk.free_bytes)} free on disk` : "",
    ),
  );
  sayOrHide(
    parts.alarm,
    words.list(
      figures.alarm
        ? `Measured memory is ${words.bytes(figures.difference_bytes)} away from what lmx accounts for.`
        : "",
      status.disk?.low ? "The disk is nearly full." : "",
    ),
  );
}
