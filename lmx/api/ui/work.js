// Two panels: the requests that are being answered, and the jobs. Draws only; `act` (actions.js) does.

import { attribute, busy, byId, el, keyed, say, sayOrHide } from "./dom.js";
import { colour, state } from "./marks.js";
import * as words from "./words.js";

const MOST_REQUESTS = 100;

export function requests(list, at, act) {
  const panel = byId("requests");
  say(byId("requests-title"), list.length ? `Requests · ${words.count(list.length)}` : "Requests");
  keyed(
    panel.querySelector("ul"),
    list.slice(0, MOST_REQUESTS),
    (request) => request.id,
    () => makeRequest(act),
    (row, request) => {
      row.request = request;
      const { parts } = row;
      state(parts.state, request.state);
      say(parts.model, request.model);
      attribute(parts.swatch, "class", `swatch c${colour(request.model)}`);
      const rate = speed(row, at, request.completion_tokens ?? 0);
      say(
        parts.tokens,
        words.list(
          request.prompt_tokens != null
            ? `${words.count(request.prompt_tokens)} in${request.cached_tokens ? ` (${words.count(request.cached_tokens)} cached)` : ""}`
            : "",
          `${words.count(request.completion_tokens)} out`,
          rate ? `${words.short(rate)}/s` : "",
        ),
      );
      say(parts.who, words.list(request.client, request.face, words.seconds(request.age_s)));
      attribute(parts.who, "title", request.id);
      parts.cancel.hidden = !act.canCancel;
      busy(parts.cancel, act.working("cancel", request.id), "Cancel", "Cancelling …");
      attribute(parts.cancel, "aria-label", `Cancel the request ${request.id}`);
    },
  );
  const more = list.length - MOST_REQUESTS;
  sayOrHide(
    panel.querySelector(".empty"),
    !list.length ? "Nobody asks for anything." : more > 0 ? `and ${words.count(more)} more` : "",
  );
}

function makeRequest(act) {
  const parts = {
    swatch: el("i", { "aria-hidden": "true" }),
    model: el("h3", { class: "name" }),
    state: el("span"),
    tokens: el("span", { class: "tokens" }),
    who: el("span", { class: "quiet who" }),
    cancel: el("button", { type: "button", class: "plain", onclick: () => act.cancel(row.request) }),
  };
  const row = el(
    "li",
    { class: "row" },
    el("div", { class: "head" }, parts.swatch, parts.model, parts.state, parts.cancel),
    el("p", { class: "beside" }, parts.tokens, parts.who),
  );
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
  keyed(
    panel.querySelector("ul"),
    shown,
    (job) => job.id,
    () => makeJob(act),
    (row, job) => updateJob(row, job, act),
  );
  panel.querySelector(".empty").hidden = shown.length > 0;
  byId("pull").hidden = !act.canPull;
  busy(byId("pull").querySelector("button"), act.working("pull", ""), "Pull", "Asking …");
}

function makeJob(act) {
  const parts = {
    name: el("h3", { class: "name" }),
    state: el("span"),
    progress: el("progress", {}),
    text: el("p", { class: "quiet beside" }),
    why: el("p", { class: "quiet" }),
    error: el("p", { class: "message bad" }),
    cancel: el("button", { type: "button", class: "plain", onclick: () => act.cancelJob(row.job) }),
  };
  const row = el(
    "li",
    { class: "row" },
    el("div", { class: "head" }, parts.name, parts.state, parts.cancel),
    parts.progress,
    parts.text,
    parts.why,
    parts.error,
  );
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
  sayOrHide(
    parts.text,
    live
      ? words.list(
          share,
          job.total_bytes ? `${words.bytes(job.done_bytes ?? 0)} of ${words.bytes(job.total_bytes)}` : "",
          job.bytes_per_s ? `${words.bytes(job.bytes_per_s)}/s` : "",
          job.eta_s ? `${words.seconds(job.eta_s)} left` : "",
          job.message,
        )
      : words.list(
          job.kind,
          job.total_bytes ? words.bytes(job.total_bytes) : "",
          job.message === job.state ? "" : job.message,
        ),
  );
  sayOrHide(parts.why, live ? job.chosen?.why : "");
  sayOrHide(parts.error, typeof job.error === "string" ? job.error : job.error?.message);
}
