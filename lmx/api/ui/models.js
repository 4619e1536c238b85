// Two panels: the models that are loaded or on the way there, and those on the disk. Draws only; `act` (actions.js) does.

import { attribute, busy, byId, el, keyed, say, sayOrHide } from "./dom.js";
import { bar, colour, engineOf, measuredOf, neededOf, ownedOf, requestsOf, state, tone } from "./marks.js";
import * as words from "./words.js";

/** Models that are loaded or on the way there. */
export function loaded(list, budget, act) {
  const panel = byId("models");
  keyed(
    panel.querySelector("ul"),
    list,
    (model) => model.id,
    (model) => makeModel(model, act),
    (card, model) => updateModel(card, model, budget, act),
  );
  panel.querySelector(".empty").hidden = list.length > 0;
}

function makeModel(model, act) {
  const parts = {
    name: el("h3", { class: "name" }),
    state: el("span"),
    unload: el("button", { type: "button", onclick: () => act.unload(card.model) }),
    about: el("p", { class: "quiet" }),
    message: el("p", { class: "message" }),
    memory: el("div", { class: "bar", "aria-hidden": "true" }),
    memoryText: el("p", { class: "quiet" }),
    kv: el("div", { class: "bar", "aria-hidden": "true" }),
    kvText: el("p", { class: "quiet" }),
    figures: el("dl", { class: "pairs" }),
    tail: el("pre", {}),
  };
  parts.tailBox = el("details", {}, el("summary", {}, "What its process wrote last"), parts.tail);
  parts.swatch = el("i", { class: `swatch c${colour(model.id)}`, "aria-hidden": "true" });
  const card = el(
    "li",
    { class: "card" },
    el("div", { class: "head" }, parts.swatch, parts.name, parts.state, parts.unload),
    parts.about,
    parts.message,
    el("div", { class: "bars" }, el("div", {}, parts.memory, parts.memoryText), el("div", {}, parts.kv, parts.kvText)),
    parts.figures,
    parts.tailBox,
  );
  card.parts = parts;
  return card;
}

function updateModel(card, model, budget, act) {
  card.model = model;
  const { parts } = card;
  const engine = engineOf(model);
  const coming = tone(model.state) === "busy";
  say(parts.name, model.id);
  state(parts.state, model.state);
  const what = coming ? "Cancel" : "Unload";
  busy(parts.unload, act.working("unload", model.id), what, "Unloading …");
  attribute(parts.unload, "aria-label", `${what} ${model.id}`);
  parts.unload.hidden = !act.canLoad || model.state === "unloading";
  const told = model.ready ?? {};
  const vectors = model.type === "embedding" || model.kind === "embeddings";
  say(
    parts.about,
    words.list(
      vectors ? "embeddings" : "",
      model.backend === "llama" ? "llama.cpp" : model.backend === "mlx" ? "MLX" : "",
      model.quantization,
      words.context(told.context_length || model.context_length),
      told.dimension ? `${told.dimension} dimensions` : "",
      (model.capabilities ?? []).join(", "),
      told.device,
      model.pinned ? "pinned" : "",
      model.expires_in_s != null ? `unloads in ${words.seconds(Math.max(0, model.expires_in_s))}` : "",
    ),
  );
  sayOrHide(parts.message, model.error || (model.state === "ready" ? "" : model.message) || engine.last_failure);
  attribute(parts.message, "class", `message ${model.error || engine.last_failure ? "bad" : ""}`);

  const [owned, measured, needed] = [ownedOf(model), measuredOf(model), neededOf(model)];
  const fill = owned || measured || (coming && needed) || 0;
  const whole = Math.max(budget ?? 0, fill, measured ?? 0) || 1;
  parts.memory.hidden = !fill;
  bar(
    parts.memory,
    [{ key: "owned", share: fill / whole, class: `c${colour(model.id)}${coming ? " coming" : ""}` }],
    measured ? [{ key: "measured", at: measured / whole, class: "tick" }] : [],
  );
  sayOrHide(
    parts.memoryText,
    fill
      ? words.list(
          owned ? `${words.bytes(owned)} owned` : "",
          measured ? `${words.bytes(measured)} measured` : "",
          coming && needed ? `${words.bytes(needed)} needed` : "",
          budget ? `of ${words.bytes(budget)}` : "",
        )
      : "",
  );

  const kept = engine.engine?.prefix?.ram_bytes;
  const kvBudget = engine.kv_budget_bytes || 0;
  parts.kv.hidden = !kvBudget;
  bar(parts.kv, [{ key: "used", share: (engine.kv_sequence_bytes ?? 0) / kvBudget, class: `c${colour(model.id)}` }]);
  sayOrHide(
    parts.kvText,
    kvBudget
      ? words.list(
          `KV ${words.bytes(engine.kv_sequence_bytes ?? 0)} of ${words.bytes(kvBudget)}`,
          kept ? `${words.bytes(kept)} of prefixes kept` : "",
        )
      : "",
  );

  const [leases, waiting] = [requestsOf(model), engine.waiting ?? 0];
  const ready = model.state === "ready";
  const writes = ready && !vectors;
  pairs(
    parts.figures,
    [
      ["running", ready && words.count(leases - waiting)],
      ["waiting", (ready || waiting > 0) && words.count(waiting)],
      ["tokens/s", writes && words.short(engine.generated_per_s_1s)],
      ["prompt/s", ready && words.short(engine.prompt_per_s_60s)],
      [vectors ? "answered in" : "first token", ready && words.milliseconds(engine.ttft_ms?.[0])],
      ["between", writes && words.milliseconds(engine.itl_ms?.[0])],
      ["restarts", engine.restarts > 0 && words.count(engine.restarts)],
    ].filter(([, value]) => value),
  );
  const tail = (engine.output_tail ?? []).join("\n");
  parts.tailBox.hidden = !tail;
  say(parts.tail, tail);
}

function pairs(element, rows) {
  element.hidden = !rows.length;
  keyed(
    element,
    rows,
    ([name]) => name,
    ([name]) => el("div", {}, el("dt", {}, name), el("dd")),
    (row, [, value]) => say(row.lastElementChild, value),
  );
}

/** Models on the disk that are not loaded, with the broken ones last. */
export function disk(list, act) {
  const panel = byId("disk");
  const filter = byId("disk-filter");
  filter.hidden = list.length < 8 && !filter.value;
  const wanted = filter.value.trim().toLowerCase();
  const found = list
    .filter((model) => model.id.toLowerCase().includes(wanted))
    .sort((a, b) => !!a.problem - !!b.problem || a.id.localeCompare(b.id));
  keyed(
    panel.querySelector("ul"),
    found,
    (model) => model.id,
    () => makeDisk(act),
    (row, model) => updateDisk(row, model, act),
  );
  sayOrHide(
    panel.querySelector(".empty"),
    found.length ? "" : wanted ? "No model’s name holds this." : "No other model is on the disk.",
  );
}

function makeDisk(act) {
  const parts = {
    name: el("h3", { class: "name" }),
    size: el("span", { class: "size" }),
    about: el("p", { class: "quiet" }),
    problem: el("p", { class: "message bad" }),
    load: el("button", { type: "button", onclick: () => act.load(row.model) }),
    remove: el("button", { type: "button", class: "plain", onclick: () => act.remove(row.model) }),
  };
  const row = el(
    "li",
    { class: "row" },
    el("div", { class: "head" }, parts.name, parts.size, el("span", { class: "buttons" }, parts.remove, parts.load)),
    parts.about,
    parts.problem,
  );
  row.parts = parts;
  return row;
}

function updateDisk(row, model, act) {
  row.model = model;
  const { parts } = row;
  say(parts.name, model.id);
  say(parts.size, words.bytes(model.size_bytes));
  const needed = neededOf(model);
  say(
    parts.about,
    words.list(
      model.kind === "embeddings" ? "embeddings" : "",
      words.parameters(model.parameters),
      model.quantization,
      model.format,
      words.context(model.context_length),
      (model.capabilities ?? []).filter((what) => what !== "embedding" || model.kind !== "embeddings").join(", "),
      needed ? `needs ${words.bytes(needed)}` : "",
      model.source === "lmx" ? "" : model.source,
      model.last_used ? `used ${words.seconds(Math.max(0, Date.now() / 1000 - model.last_used))} ago` : "",
    ),
  );
  sayOrHide(parts.problem, model.problem || model.error);
  parts.load.hidden = !act.canLoad || !!model.problem;
  busy(parts.load, act.working("load", model.id), "Load", "Loading …");
  attribute(parts.load, "aria-label", `Load ${model.id}`);
  parts.remove.hidden = !act.canLoad || model.source === "embedded";
  busy(parts.remove, act.working("remove", model.id), "Delete", "Deleting …");
  attribute(parts.remove, "aria-label", `Delete ${model.id} from the disk`);
}
