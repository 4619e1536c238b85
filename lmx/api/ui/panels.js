// What the API said, put into the page: models, requests, jobs, memory. Draws only; `act` (actions.js) does.

import { attribute, busy, byId, el, keyed, say, sayOrHide } from "./dom.js";
import * as words from "./words.js";

const TONES = { ready: "good", failed: "bad", broken: "bad", draining: "warn", unloading: "warn", stopped: "warn", cancelled: "warn", done: "good", decode: "good", "on disk": "none" };
/** Whatever is on its way: loading, waiting, restarting, queued, running … */
export const tone = (state) => TONES[state] ?? "busy";

const COLOURS = 6;
const colours = new Map();
/** A model keeps its colour as long as the page lives. */
export function colour(id) {
  if (!colours.has(id)) colours.set(id, colours.size % COLOURS);
  return colours.get(id);
}

function state(element, name) {
  attribute(element, "class", `state ${tone(name)}`);
  say(element, name);
}

/** A bar of parts, each a share of the whole, and marks on it. */
function bar(element, parts, marks = []) {
  keyed(element, [...parts.filter((part) => part.share > 0), ...marks], (part) => part.key, () => el("i"), (piece, part) => {
    attribute(piece, "class", part.class);
    attribute(piece, "title", part.title);
    if (part.at === undefined) piece.style.width = `${Math.min(100, part.share * 100)}%`;
    else piece.style.left = `${Math.min(100, part.at * 100)}%`;
  });
}

const engineOf = (model) => model.engine ?? {};
const ownedOf = (model) => model.memory?.owned_bytes ?? model.owned_bytes ?? null;
const measuredOf = (model) => model.memory?.measured_bytes || model.measured_bytes || engineOf(model).engine?.rss_bytes || null;
const neededOf = (model) => model.needed_bytes || model.memory?.estimate?.total_bytes || model.estimate?.total_bytes || null;
export const streamsOf = (model) => engineOf(model).live_leases ?? model.leases ?? 0;

/** Models that are loaded or on the way there. */
export function models(list, budget, act) {
  const panel = byId("models");
  keyed(panel.querySelector("ul"), list, (model) => model.id, (model) => makeModel(model, act), (card, model) => updateModel(card, model, budget, act));
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
  const card = el("li", { class: "card" },
    el("div", { class: "head" }, parts.swatch, parts.name, parts.state, parts.unload),
    parts.about, parts.message,
    el("div", { class: "bars" }, el("div", {}, parts.memory, parts.memoryText), el("div", {}, parts.kv, parts.kvText)),
    parts.figures, parts.tailBox);
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
  parts.unload.hidden = !act.canUnload || model.state === "unloading";
  const ready = model.ready ?? {};
  say(parts.about, words.list(
    model.type === "embedding" || model.kind === "embeddings" ? "embeddings" : "", model.backend === "llama" ? "llama.cpp" : model.backend === "mlx" ? "MLX" : "",
    model.quantization, words.context(ready.context_length || model.context_length), ready.dimension ? `${ready.dimension} dimensions` : "",
    (model.capabilities ?? []).join(", "), ready.device, model.pinned ? "pinned" : "",
    model.expires_in_s != null ? `unloads in ${words.seconds(Math.max(0, model.expires_in_s))}` : ""));
  sayOrHide(parts.message, model.error || (coming ? model.message : "") || engine.last_failure);
  attribute(parts.message, "class", `message ${model.error || engine.last_failure ? "bad" : ""}`);

  const [owned, measured, needed] = [ownedOf(model), measuredOf(model), neededOf(model)];
  const fill = owned ?? measured ?? (coming ? needed : 0) ?? 0;
  const whole = Math.max(budget ?? 0, fill, measured ?? 0) || 1;
  parts.memory.hidden = !fill;
  bar(parts.memory, [{ key: "owned", share: fill / whole, class: `c${colour(model.id)}${coming ? " coming" : ""}` }], measured ? [{ key: "measured", at: measured / whole, class: "tick" }] : []);
  sayOrHide(parts.memoryText, fill ? words.list(
    owned ? `${words.bytes(owned)} owned` : "", measured ? `${words.bytes(measured)} measured` : "", coming && needed ? `${words.bytes(needed)} needed` : "",
    budget ? `of ${words.bytes(budget)}` : "") : "");

  const own = engine.engine ?? {};
  const kvBudget = engine.kv_budget_bytes || 0;
  parts.kv.hidden = !kvBudget;
  bar(parts.kv, [
    { key: "used", share: (engine.kv_sequence_bytes ?? 0) / kvBudget, class: `c${colour(model.id)}` },
    { key: "kept", share: (own.prefix?.ram_bytes ?? 0) / kvBudget, class: `c${colour(model.id)} coming` },
  ]);
  sayOrHide(parts.kvText, kvBudget ? words.list(
    `KV ${words.bytes(engine.kv_sequence_bytes ?? 0)} of ${words.bytes(kvBudget)}`, own.prefix?.ram_bytes ? `${words.bytes(own.prefix.ram_bytes)} kept for prefixes` : "") : "");

  const [leases, waiting] = [streamsOf(model), engine.waiting ?? 0];
  pairs(parts.figures, model.state === "ready" || leases ? [
    ["running", words.count(leases - waiting)],
    ["waiting", words.count(waiting)],
    ["tokens/s", words.short(engine.generated_per_s_1s)],
    ["prompt/s", words.short(engine.prompt_per_s_60s)],
    ["first token", words.milliseconds(engine.ttft_ms?.[0])],
    ["between", words.milliseconds(engine.itl_ms?.[0])],
    ["restarts", engine.restarts ? words.count(engine.restarts) : null],
  ].filter(([, value]) => value !== null) : []);
  const tail = (engine.output_tail ?? []).join("\n");
  parts.tailBox.hidden = !tail;
  say(parts.tail, tail);
}

function pairs(element, rows) {
  element.hidden = !rows.length;
  keyed(element, rows, ([name]) => name, ([name]) => el("div", {}, el("dt", {}, name), el("dd")), (row, [, value]) => say(row.lastElementChild, value));
}

/** Models on the disk that are not loaded, with the broken ones last. */
export function disk(list, act) {
  const panel = byId("disk");
  const filter = byId("disk-filter");
  filter.hidden = list.length < 8 && !filter.value;
  const wanted = filter.value.trim().toLowerCase();
  const found = list.filter((model) => model.id.toLowerCase().includes(wanted)).sort((a, b) => !!a.problem - !!b.problem || a.id.localeCompare(b.id));
  keyed(panel.querySelector("ul"), found, (model) => model.id, () => makeDisk(act), (row, model) => updateDisk(row, model, act));
  sayOrHide(panel.querySelector(".empty"), found.length ? "" : wanted ? "No model’s name holds this." : "No other model is on the disk.");
}

function makeDisk(act) {
  const parts = {
    name: el("h3", { class: "name" }), size: el("span", { class: "size" }), about: el("p", { class: "quiet" }), problem: el("p", { class: "message bad" }),
    load: el("button", { type: "button", onclick: () => act.load(row.model) }),
    remove: el("button", { type: "button", class: "plain", onclick: () => act.remove(row.model) }),
  };
  const row = el("li", { class: "row" }, el("div", { class: "head" }, parts.name, parts.size, el("span", { class: "buttons" }, parts.remove, parts.load)), parts.about, parts.problem);
  row.parts = parts;
  return row;
}

function updateDisk(row, model, act) {
  row.model = model;
  const { parts } = row;
  say(parts.name, model.id);
  say(parts.size, words.bytes(model.size_bytes));
  const needed = neededOf(model);
  say(parts.about, words.list(
    model.kind === "embeddings" ? "embeddings" : "", words.parameters(model.parameters), model.quantization, model.format, words.context(model.context_length),
    (model.capabilities ?? []).filter((what) => what !== "embedding" || model.kind !== "embeddings").join(", "),
    needed ? `needs ${words.bytes(needed)}` : "", model.source === "lmx" ? "" : model.source, model.last_used ? `used ${words.seconds(Math.max(0, Date.now() / 1000 - model.last_used))} ago` : ""));
  sayOrHide(parts.problem, model.problem || model.error);
  parts.load.hidden = !act.canLoad || !!model.problem;
  busy(parts.load, act.working("load", model.id), "Load", "Loading …");
  attribute(parts.load, "aria-label", `Load ${model.id}`);
  parts.remove.hidden = !act.canLoad;
  busy(parts.remove, act.working("remove", model.id), "Delete", "Deleting …");
  attribute(parts.remove, "aria-label", `Delete ${model.id} from the disk`);
}

export function requests(list, at, act) {
  const panel = byId("requests");
  say(byId("requests-title"), list.length ? `Requests · ${words.count(list.length)}` : "Requests");
  keyed(panel.querySelector("ul"), list, (request) => request.id, () => makeRequest(act), (row, request) => {
    row.request = request;
    const { parts } = row;
    state(parts.state, request.state);
    say(parts.model, request.model);
    attribute(parts.swatch, "class", `swatch c${colour(request.model)}`);
    const rate = speed(row, at, request.completion_tokens ?? 0);
    say(parts.tokens, words.list(
      request.prompt_tokens != null ? `${words.count(request.prompt_tokens)} in${request.cached_tokens ? ` (${words.count(request.cached_tokens)} cached)` : ""}` : "",
      `${words.count(request.completion_tokens)} out`, rate ? `${words.short(rate)}/s` : ""));
    say(parts.who, words.list(request.client, request.face, words.seconds(request.age_s)));
    attribute(parts.who, "title", request.id);
    parts.cancel.hidden = !act.canCancel;
    busy(parts.cancel, act.working("cancel", request.id), "Cancel", "Cancelling …");
    attribute(parts.cancel, "aria-label", `Cancel the request ${request.id}`);
  });
  panel.querySelector(".empty").hidden = list.length > 0;
}

function makeRequest(act) {
  const parts = {
    swatch: el("i", { "aria-hidden": "true" }), model: el("h3", { class: "name" }), state: el("span"), tokens: el("span", { class: "tokens" }), who: el("span", { class: "quiet who" }),
    cancel: el("button", { type: "button", class: "plain", onclick: () => act.cancel(row.request) }),
  };
  const row = el("li", { class: "row" }, el("div", { class: "head" }, parts.swatch, parts.model, parts.state, parts.cancel), el("p", { class: "beside" }, parts.tokens, parts.who));
  row.parts = parts;
  row.past = [];
  return row;
}

/** Tokens a second of one request, over what was seen of it in the last five seconds. */
function speed(row, at, tokens) {
  if (row.past.at(-1)?.at !== at) row.past.push({ at, tokens });
  while (row.past.length > 2 && at - row.past[0].at > 5000) row.past.shift();
  const first = row.past[0];
  return at > first.at ? ((tokens - first.tokens) * 1000) / (at - first.at) : 0;
}

const ENDED = new Set(["done", "failed", "cancelled"]);
const LAST_ENDED = 5;
export const runs = (job) => !ENDED.has(job.state);

export function jobs(list, act) {
  const panel = byId("jobs");
  const newest = [...list].sort((a, b) => (b.created ?? 0) - (a.created ?? 0));
  const shown = [...newest.filter(runs), ...newest.filter((job) => !runs(job)).slice(0, LAST_ENDED)];
  keyed(panel.querySelector("ul"), shown, (job) => job.id, () => makeJob(act), (row, job) => updateJob(row, job, act));
  panel.querySelector(".empty").hidden = shown.length > 0;
  byId("pull").hidden = !act.canPull;
  busy(byId("pull").querySelector("button"), act.working("pull", ""), "Pull", "Asking …");
}

function makeJob(act) {
  const parts = {
    name: el("h3", { class: "name" }), state: el("span"), progress: el("progress", {}), text: el("p", { class: "quiet beside" }), why: el("p", { class: "quiet" }), error: el("p", { class: "message bad" }),
    cancel: el("button", { type: "button", class: "plain", onclick: () => act.cancelJob(row.job) }),
  };
  const row = el("li", { class: "row" }, el("div", { class: "head" }, parts.name, parts.state, parts.cancel), parts.progress, parts.text, parts.why, parts.error);
  row.parts = parts;
  return row;
}

function updateJob(row, job, act) {
  row.job = job;
  const { parts } = row;
  const live = runs(job);
  say(parts.name, job.model);
  state(parts.state, live ? `${job.kind} ${job.state}` : job.state);
  if (job.state === "queued") attribute(parts.state, "class", "state none");
  parts.cancel.hidden = !live || !act.canLoad;
  busy(parts.cancel, act.working("job", job.id), "Cancel", "Cancelling …");
  attribute(parts.cancel, "aria-label", `Cancel the ${job.kind} of ${job.model}`);
  parts.progress.hidden = !live;
  if (job.total_bytes) {
    attribute(parts.progress, "max", job.total_bytes);
    attribute(parts.progress, "value", job.done_bytes ?? 0);
  } else attribute(parts.progress, "value", null);
  attribute(parts.progress, "aria-label", `${job.kind} of ${job.model}`);
  const share = job.total_bytes ? `${Math.floor((100 * (job.done_bytes ?? 0)) / job.total_bytes)} %` : "";
  sayOrHide(parts.text, live
    ? words.list(share, job.total_bytes ? `${words.bytes(job.done_bytes ?? 0)} of ${words.bytes(job.total_bytes)}` : "", job.bytes_per_s ? `${words.bytes(job.bytes_per_s)}/s` : "", job.eta_s ? `${words.seconds(job.eta_s)} left` : "", job.message)
    : words.list(job.kind, job.total_bytes ? words.bytes(job.total_bytes) : "", job.message));
  sayOrHide(parts.why, live ? job.chosen?.why : "");
  sayOrHide(parts.error, typeof job.error === "string" ? job.error : job.error?.message);
}

/** The machine's memory: each model, this server, everything else; the budget as a mark. */
export function memory(status) {
  const panel = byId("memory");
  if (!panel.parts) {
    panel.parts = { figure: el("p", { class: "figure" }), bar: el("div", { class: "bar tall", "aria-hidden": "true" }), legend: el("ul", { class: "legend" }), note: el("p", { class: "quiet note" }), alarm: el("p", { class: "message bad" }) };
    panel.append(...Object.values(panel.parts));
  }
  const { parts } = panel;
  const figures = status.memory ?? {};
  const total = figures.total_bytes || 1;
  const pieces = status.models.map((model) => ({ key: model.id, bytes: measuredOf(model) ?? ownedOf(model) ?? 0, class: `c${colour(model.id)}` }));
  pieces.push({ key: "server", label: "lmx itself", bytes: figures.server_rss_bytes ?? 0, class: "self" });
  const ours = pieces.reduce((all, piece) => all + piece.bytes, 0);
  const others = Math.max(0, total - (figures.available_bytes ?? total) - ours);
  pieces.push({ key: "others", label: "other programs", bytes: others, class: "others" });
  const budget = figures.budget_bytes;
  say(parts.figure, `${words.bytes(figures.available_bytes)} free`);
  bar(parts.bar, pieces.map((piece) => ({ ...piece, share: piece.bytes / total, title: `${piece.label ?? piece.key}: ${words.bytes(piece.bytes)}` })), budget ? [{ key: "budget", at: budget / total, class: "tick", title: `budget: ${words.bytes(budget)}` }] : []);
  keyed(parts.legend, pieces.filter((piece) => piece.bytes), (piece) => piece.key, (piece) => el("li", {}, el("i", { class: `swatch ${piece.class}` }), el("span", { class: "name" }, piece.label ?? piece.key), el("b")), (row, piece) => say(row.lastElementChild, words.bytes(piece.bytes)));
  say(parts.note, words.list(
    `of ${words.bytes(figures.total_bytes)}`, budget ? `models may take ${words.bytes(budget)}` : "", figures.owned_bytes != null ? `${words.bytes(figures.owned_bytes)} owned` : "",
    status.disk?.free_bytes != null ? `${words.bytes(status.disk.free_bytes)} free on disk` : ""));
  sayOrHide(parts.alarm, words.list(
    figures.alarm ? `Measured memory is ${words.bytes(figures.difference_bytes)} away from what lmx accounts for.` : "", status.disk?.low ? "The disk is nearly full." : ""));
}
