// The operators' page: asks the admin face while somebody looks, and draws what it says. What is old is never shown as if
// it were fresh: a banner tells its age, and the page fades.

import { Actions } from "./actions.js";
import { attribute, byId, el, keyed, say, sayOrHide } from "./dom.js";
import * as panels from "./panels.js";
import { Plot, sum } from "./plot.js";
import { key } from "./server.js";
import { Source } from "./source.js";
import * as words from "./words.js";

const FRESH_MS = 3000;

const status = new Source("/admin/status", 1000, seen);
const health = new Source("/health", 1000, draw);
const sources = {
  status,
  models: new Source("/admin/models", 4000, draw),
  requests: new Source("/admin/requests", 1000, draw),
  jobs: new Source("/admin/jobs", (answer) => (answer?.jobs?.some(panels.runs) ? 1000 : 3000), draw),
};
const others = Object.values(sources).filter((source) => source !== status);
const act = new Actions(sources, draw);

const perSecond = (value) => words.short(value);
const rate = new Plot(byId("rate"), { stacked: true, format: perSecond, colour: panels.colour, about: "Tokens generated a second" });
const ttft = new Plot(byId("ttft"), { format: words.milliseconds, colour: panels.colour, about: "Time to first token" });
let uptime = 0;

/** The server's status came, or did not. */
function seen() {
  if (status.forbidden) for (const source of others) source.stop(), source.forget();
  else if (!document.hidden) for (const source of others) source.start();
  if (status.forbidden && !document.hidden) health.start();
  else health.stop();
  if (!status.error) sample(status.data);
  draw();
}

function sample(data) {
  const at = performance.now();
  const anew = data.uptime_s < uptime;
  uptime = data.uptime_s;
  const llms = data.models.filter((model) => model.state === "ready" && model.type !== "embedding");
  const each = (value) => new Map(llms.map((model) => [model.id, value(model.engine)]).filter(([, figure]) => figure != null));
  rate.add({ at, anew, values: each((engine) => engine.generated_per_s_1s), dashed: new Map() });
  ttft.add({ at, anew, values: each((engine) => engine.ttft_ms?.[0]), dashed: each((engine) => engine.ttft_ms?.[1]) });
}

let asked = 0;
/** Once a frame at most. */
function draw() {
  if (!asked) asked = requestAnimationFrame(() => { asked = 0; drawNow(); });
}

function drawNow() {
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
  const live = data.models.map((model) => ({ ...sources.models.data?.models.find((other) => other.id === model.id), ...model }));
  const loaded = new Set(live.map((model) => model.id));
  const onDisk = (sources.models.data?.models ?? []).filter((model) => !loaded.has(model.id));
  const ready = data.models.filter((model) => model.state === "ready" && model.type !== "embedding");
  const now = performance.now();
  const figures = ready.map((model) => model.engine);
  rate.draw(now, perSecond(sum(new Map(figures.map((engine, i) => [i, engine.generated_per_s_1s])))), `${words.short(sum(new Map(figures.map((engine, i) => [i, engine.prompt_per_s_60s]))))} prompt tokens a second over the last minute`);
  const first = figures.map((engine) => engine.ttft_ms).filter(Boolean);
  ttft.draw(now, words.milliseconds(first.length ? Math.max(...first.map((each) => each[0])) : null), first.length ? `half come within this, 95 of 100 within ${words.milliseconds(Math.max(...first.map((each) => each[1])))} (dashed); each model’s last thousand requests` : "nobody has asked yet");
  panels.memory({ ...data, models: live });
  panels.models(live, data.memory?.budget_bytes ?? data.memory?.total_bytes, act);
  panel("disk", sources.models, () => panels.disk(onDisk, act));
  panel("requests", sources.requests, (answer, at) => panels.requests(answer.requests, at, act));
  panel("jobs", sources.jobs, (answer) => panels.jobs(answer.jobs, act));
}

/** Hidden where the server has no such path; says so itself when it alone could not be refreshed. */
function panel(id, source, fill) {
  const box = byId(id);
  box.hidden = source.missing || (!source.data && !source.error);
  if (source.data) fill(source.data, performance.now() - source.age);
  sayOrHide(box.querySelector(".late"), source.error && !source.missing ? words.list(source.error.message, source.data ? `shown as of ${words.seconds(source.age / 1000)} ago` : "") : "");
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
  const streams = data.models.reduce((all, model) => all + panels.streamsOf(model), 0);
  const coming = states.length - ready - failed;
  const text = words.list(data.draining ? "shutting down" : "", `${words.plural(ready, "model")} ready`, coming ? `${coming} on the way` : "", failed ? `${failed} failed` : "", streams ? words.plural(streams, "request") : "");
  head(failed ? "bad" : data.draining ? "warn" : coming ? "busy" : "good", text);
  say(byId("server"), words.list(`version ${data.version}`, `up ${words.seconds(data.uptime_s)}`, location.host));
}

function drawFreshness() {
  const source = status.forbidden ? health : status;
  const { age, error } = source;
  const old = age !== null && age > FRESH_MS;
  const trouble = error && !source.forbidden && !source.missing;
  const text = !trouble && !old ? "" : [error && trouble ? error.message : "Asking the server …", age === null ? "" : `What is shown is ${words.seconds(age / 1000)} old.`].join(" ");
  sayOrHide(byId("banner"), text);
  document.body.classList.toggle("stale", !!text);
  if (text) head("bad", error ? "No answer" : "Asking …");
  return !!text;
}

function drawAccess() {
  byId("access").hidden = !status.forbidden;
  if (!status.forbidden) return;
  say(byId("access-why"), status.error.message);
  // Without admin keys at the server none would help; then its words say what would.
  byId("access-form").hidden = status.error.status === 403 && !key.get();
  keyed(byId("access-models"), Object.entries(health.data?.models ?? {}), ([id]) => id, () => el("li", {}, el("span", { class: "name" }), el("span")), (row, [id, state]) => {
    say(row.firstElementChild, id);
    say(row.lastElementChild, state);
    attribute(row.lastElementChild, "class", `state ${panels.tone(state)}`);
  });
}

function keyChanged(value) {
  key.set(value);
  byId("access-key").value = "";
  for (const source of [...Object.values(sources), health]) source.forget();
  status.soon();
}

byId("access-form").addEventListener("submit", (event) => { event.preventDefault(); keyChanged(byId("access-key").value.trim()); });
byId("forget").addEventListener("click", () => keyChanged(""));
byId("disk-filter").addEventListener("input", draw);
byId("pull").addEventListener("submit", async (event) => {
  event.preventDefault();
  const input = byId("pull-model");
  const name = input.value.trim();
  if (name && !act.working("pull", "")) await act.pull(name);
});

function look() {
  if (document.hidden) for (const source of [...Object.values(sources), health]) source.stop();
  else status.start(); // the others follow its answer
  drawNow();
}
document.addEventListener("visibilitychange", look);
setInterval(() => { if (!document.hidden) draw(); }, 1000); // ages grow without an answer, too
look();
