// The operators' page: asks the admin face while somebody looks, and draws what it says. What is old is never shown as if
// it were fresh: a banner tells its age, and the page fades.

import { Actions } from "./actions.js";
import { attribute, byId, el, keyed, say, sayOrHide } from "./dom.js";
import { colour, requestsOf, state } from "./marks.js";
import { memory } from "./memory.js";
import * as models from "./models.js";
import { Plot } from "./plot.js";
import { key } from "./server.js";
import { Source } from "./source.js";
import * as words from "./words.js";
import * as work from "./work.js";

const status = new Source("/admin/status", 1000, seen);
const health = new Source("/health", 1000, draw);
const sources = {
  status,
  models: new Source("/admin/models", 4000, draw),
  requests: new Source("/admin/requests", 1000, draw),
  jobs: new Source("/admin/jobs", (answer) => (answer?.jobs?.some(work.runs) ? 1000 : 3000), draw),
};
const others = Object.values(sources).filter((source) => source !== status);
const act = new Actions(sources, draw);

const rate = new Plot(byId("rate"), {
  stacked: true,
  format: words.short,
  colour,
  about: "Tokens generated a second",
});
const ttft = new Plot(byId("ttft"), {
  format: words.milliseconds,
  colour,
  about: "Time to first token",
});
let uptime = 0;

/** The server's status came, or did not. */
function seen() {
  if (status.forbidden) for (const source of others) (source.stop(), source.forget());
  else if (!document.hidden) for (const source of others) source.start();
  if (status.forbidden && !document.hidden) health.start();
  else health.stop();
  if (!status.error) sample(status.data);
  draw();
}

/** The engines that generate text and are ready. */
const writers = (data) => data.models.filter((model) => model.state === "ready" && model.type !== "embedding");

function sample(data) {
  const at = performance.now();
  const anew = data.uptime_s < uptime;
  uptime = data.uptime_s;
  const llms = writers(data);
  const each = (value) =>
    new Map(llms.map((model) => [model.id, value(model.engine)]).filter(([, figure]) => figure != null));
  rate.add({ at, anew, values: each((engine) => engine.generated_per_s_1s), dashed: new Map() });
  ttft.add({ at, anew, values: each((engine) => engine.ttft_ms?.[0]), dashed: each((engine) => engine.ttft_ms?.[1]) });
}

let asked = 0;
/** Once a frame at most. */
function draw() {
  if (!asked)
    asked = requestAnimationFrame(() => {
      asked = 0;
      drawNow();
    });
}

function drawNow() {
  try {
    drawAll();
  } catch (error) {
    console.error(error);
    warn("This page could not show all that the server told; what it shows may be old.", error.message);
  }
}

function drawAll() {
  const data = status.data;
  const old = drawFreshness();
  drawAccess();
  byId("forget").hidden = !key.get();
  byId("figures").hidden = byId("columns").hidden = !data;
  if (!data) {
    if (status.forbidden && !old) head("none", "Read only");
    return;
  }
  if (!old) drawHead(data);
  drawPlots(writers(data).map((model) => model.engine));
  memory(data);
  const known = new Map(sources.models.data?.models.map((model) => [model.id, model]));
  // Of what is asked for more seldom, only what does not change.
  const loaded = data.models.map((model) => ({ capabilities: known.get(model.id)?.capabilities, ...model }));
  models.loaded(loaded, data.memory?.budget_bytes ?? data.memory?.total_bytes, act);
  for (const model of loaded) known.delete(model.id);
  panel("disk", sources.models, () => models.disk([...known.values()], act));
  panel("requests", sources.requests, (answer) => work.requests(answer.requests, sources.requests.at, act));
  panel("jobs", sources.jobs, (answer) => work.jobs(answer.jobs, act));
}

function drawPlots(engines) {
  const now = performance.now();
  const all = (figure) => words.short(engines.reduce((total, engine) => total + (engine[figure] ?? 0), 0));
  rate.draw(now, all("generated_per_s_1s"), `${all("prompt_per_s_60s")} prompt tokens a second over the last minute`);
  const asked = engines.filter((engine) => engine.ttft_ms).map((engine) => engine.ttft_ms);
  const slowest = asked.reduce((most, each) => (each[0] > most[0] ? each : most), [null, null]);
  ttft.draw(
    now,
    words.milliseconds(slowest[0]),
    asked.length
      ? `${asked.length > 1 ? "slowest model: " : ""}half come within this, 95 of 100 within ${words.milliseconds(slowest[1])} (dashed), of its last thousand requests`
      : "nobody has asked yet",
  );
}

/** Hidden where the server has no such path; says so itself when it alone could not be refreshed. */
function panel(id, source, fill) {
  const box = byId(id);
  box.hidden = source.missing || (!source.data && !source.error);
  if (source.data) fill(source.data);
  sayOrHide(box.querySelector(".late"), source.missing || status.late[0] ? "" : source.late.join(" "));
}

function head(tone, text) {
  attribute(byId("summary").firstElementChild, "class", `dot ${tone}`);
  say(byId("summary").lastElementChild, text);
  document.title = `lmx: ${text}`;
}

function drawHead(data) {
  const states = data.models.map((model) => model.state);
  const ready = states.filter((state) => state === "ready").length;
  const failed = states.filter((state) => state === "failed").length;
  const streams = data.models.reduce((all, model) => all + requestsOf(model), 0);
  const coming = states.length - ready - failed;
  const text = words.list(
    data.draining ? "shutting down" : "",
    `${words.plural(ready, "model")} ready`,
    coming ? `${coming} on the way` : "",
    failed ? `${failed} failed` : "",
    streams ? words.plural(streams, "request") : "",
  );
  head(failed ? "bad" : data.draining ? "warn" : coming ? "busy" : "good", text);
  say(byId("server"), words.list(`version ${data.version}`, `up ${words.seconds(data.uptime_s)}`, location.host));
}

/** The banner over a faded page; without a message: neither. */
function warn(message, more) {
  const banner = byId("banner");
  banner.hidden = !message;
  say(banner.firstElementChild, message); // told by screen readers when it changes; the rest, an age, is not
  say(banner.lastElementChild, more);
  document.body.classList.toggle("stale", !!message);
}

function drawFreshness() {
  const source = status.forbidden ? health : status;
  const [message, age] = source.late;
  warn(message, age);
  if (message) head("bad", !source.error ? "Asking …" : source.error.status ? "Trouble" : "No answer");
  return !!message;
}

function drawAccess() {
  byId("access").hidden = !status.forbidden;
  if (!status.forbidden) return;
  say(
    byId("access-title"),
    key.get() || status.error.status === 403 ? "Read only" : "This server asks for an admin key",
  );
  say(byId("access-why"), status.error.message);
  // Without admin keys at the server none would help; then its words say what would.
  byId("access-form").hidden = status.error.status === 403 && !key.get();
  keyed(
    byId("access-models"),
    Object.entries(health.data?.models ?? {}),
    ([id]) => id,
    () => el("li", {}, el("span", { class: "name" }), el("span")),
    (row, [id, name]) => {
      say(row.firstElementChild, id);
      state(row.lastElementChild, name);
    },
  );
}

function keyChanged(value) {
  key.set(value);
  byId("access-key").value = "";
  for (const source of [...Object.values(sources), health]) source.forget();
  status.soon();
}

byId("access-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keyChanged(byId("access-key").value.trim());
});
byId("forget").addEventListener("click", () => keyChanged(""));
byId("disk-filter").addEventListener("input", draw);
byId("pull").addEventListener("submit", async (event) => {
  event.preventDefault();
  const input = byId("pull-model");
  const name = input.value.trim();
  if (name && (await act.pull(name))) input.value = "";
});

function look() {
  if (document.hidden) for (const source of [...Object.values(sources), health]) source.stop();
  else status.start(); // the others follow its answer
  drawNow();
}
document.addEventListener("visibilitychange", look);
setInterval(() => {
  if (!document.hidden) draw();
}, 1000); // ages grow without an answer, too
look();
