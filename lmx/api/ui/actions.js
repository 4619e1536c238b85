// What an operator can do: load, unload, delete, cancel, pull. Asks before it destroys, tells how it ended.

import { byId, el, say } from "./dom.js";
import { ask } from "./server.js";
import * as words from "./words.js";

const SEEN_MS = 6000;

/** Errors stay until they are dismissed; what went well leaves by itself. */
export function notice(text, bad = false) {
  const box = el("div", { class: `notice ${bad ? "bad" : "good"}`, role: bad ? "alert" : "status" }, el("span", {}, text), el("button", { type: "button", class: "plain", "aria-label": "Dismiss", onclick: () => box.remove() }, "×"));
  byId("notices").append(box);
  if (!bad) setTimeout(() => box.remove(), SEEN_MS);
}

/** Resolves to true when the operator says yes. The safe button has the focus. */
export function confirmed(title, text, yes, paths = []) {
  const dialog = byId("confirm");
  say(byId("confirm-title"), title);
  say(byId("confirm-text"), text);
  byId("confirm-list").replaceChildren(...paths.map((path) => el("li", {}, path)));
  say(byId("confirm-yes"), yes);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

const named = (id) => encodeURIComponent(id).replaceAll("%2F", "/");

export class Actions {
  /** `changed()` draws again; `sources` are asked at once after an action. */
  constructor(sources, changed) {
    this.sources = sources;
    this.changed = changed;
    this.running = new Set();
  }

  get canLoad() { return !this.sources.models.missing; }
  get canUnload() { return this.canLoad; }
  get canCancel() { return !this.sources.requests.missing; }
  get canPull() { return !this.sources.jobs.missing; }

  working(what, id) { return this.running.has(`${what} ${id}`); }

  async #do(what, id, call, told) {
    const name = `${what} ${id}`;
    if (this.running.has(name)) return;
    this.running.add(name);
    this.changed();
    try {
      const pending = call();
      this.#look();
      const answer = await pending;
      if (told) notice(told(answer));
    } catch (error) {
      notice(error.message, true);
    } finally {
      this.running.delete(name);
      this.#look();
      this.changed();
    }
  }

  #look() {
    for (const source of Object.values(this.sources)) if (!source.missing) source.soon();
  }

  load(model) {
    return this.#do("load", model.id, () => ask("/admin/load", { method: "POST", body: { model: model.id, wait: false } }));
  }

  async unload(model) {
    const streams = model.engine?.live_leases ?? model.leases ?? 0;
    if (streams && !(await confirmed(`Unload ${model.id}?`, `${words.plural(streams, "request")} ${streams === 1 ? "is" : "are"} being answered: what does not finish in time is cancelled.`, "Unload"))) return;
    await this.#do("unload", model.id, () => ask("/admin/unload", { method: "POST", body: { model: model.id }, patience: 0 }), (answer) => `${model.id} is unloaded; ${words.bytes(answer.freed_bytes)} are free again.`);
  }

  async remove(model) {
    const path = `/admin/models/${named(model.id)}`;
    let plan;
    await this.#do("remove", model.id, async () => { plan = await ask(`${path}?dry_run=true`, { method: "DELETE" }); });
    if (!plan || !(await confirmed(`Delete ${model.id} from the disk?`, `${words.bytes(plan.freed_bytes)} are freed. It would have to be downloaded again.`, "Delete", plan.paths ?? []))) return;
    await this.#do("remove", model.id, () => ask(path, { method: "DELETE", patience: 0 }), (answer) => `${model.id} is deleted; ${words.bytes(answer.freed_bytes)} are free again.`);
  }

  async cancel(request) {
    if (!(await confirmed("Cancel this request?", `${request.client || "Its client"} gets no more of the answer of ${request.model} (${words.plural(request.completion_tokens ?? 0, "token")} so far).`, "Cancel the request"))) return;
    await this.#do("cancel", request.id, () => ask(`/admin/requests/${named(request.id)}/cancel`, { method: "POST" }));
  }

  async cancelJob(job) {
    if (!(await confirmed(`Cancel the ${job.kind}?`, `${job.model} will not be there.`, `Cancel the ${job.kind}`))) return;
    await this.#do("job", job.id, () => ask(`/admin/jobs/${named(job.id)}`, { method: "DELETE" }));
  }

  async pull(name) {
    await this.#do("pull", "", () => ask("/admin/download", { method: "POST", body: { model: name }, patience: 60_000 }), (job) => job.chosen?.why || `${job.model} is on its way.`);
  }
}
