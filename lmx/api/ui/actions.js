// What an operator can do: load, unload, delete, cancel, pull. Asks before it destroys, tells how it ended.

import { byId, el, say } from "./dom.js";
import { requestsOf } from "./marks.js";
import { ask } from "./server.js";
import * as words from "./words.js";

const SEEN_MS = 6000;

/** Errors stay until they are dismissed; what went well leaves by itself. */
function notice(text, bad = false) {
  const box = el(
    "div",
    { class: `notice ${bad ? "bad" : "good"}`, role: bad ? "alert" : null },
    el("span", {}, text),
    el("button", { type: "button", class: "plain", "aria-label": "Dismiss", onclick: () => box.remove() }, "×"),
  );
  for (const other of [...byId("notices").children]) if (other.firstChild.textContent === text) other.remove();
  byId("notices").append(box);
  if (!bad) setTimeout(() => box.remove(), SEEN_MS);
}

/** Resolves to true when the operator says yes. The safe button has the focus. */
function confirmed(title, text, yes, paths = []) {
  const dialog = byId("confirm");
  say(byId("confirm-title"), title);
  say(byId("confirm-text"), text);
  byId("confirm-list").replaceChildren(...paths.map((path) => el("li", {}, path)));
  say(byId("confirm-yes"), yes);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }),
  );
}

const named = (id) => encodeURIComponent(id).replaceAll("%2F", "/");

export class Actions {
  /** `changed()` draws again; `sources` are asked at once after an action. */
  constructor(sources, changed) {
    this.sources = sources;
    this.changed = changed;
    this.running = new Set();
  }

  get canLoad() {
    return !this.sources.models.missing;
  }
  get canCancel() {
    return !this.sources.requests.missing;
  }
  get canPull() {
    return !this.sources.jobs.missing;
  }

  working(what, id) {
    return this.running.has(`${what} ${id}`);
  }

  /**
   * One action on `id`, once at a time: asks with `confirm` (a list of what `confirmed` takes), then calls `call`, then
   * tells what `told` makes of the answer. The answer; undefined when it did not come to one.
   */
  async #do(what, id, { confirm, call, told }) {
    const name = `${what} ${id}`;
    if (this.running.has(name) || (confirm && !(await confirmed(...confirm)))) return undefined;
    this.running.add(name);
    this.changed();
    try {
      const pending = call();
      this.#look();
      const answer = await pending;
      if (told) notice(told(answer));
      return answer;
    } catch (error) {
      notice(error.message, true);
      return undefined;
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
    const body = { model: model.id, wait: false };
    return this.#do("load", model.id, { call: () => ask("/admin/load", { method: "POST", body }) });
  }

  unload(model) {
    const requests = requestsOf(model);
    return this.#do("unload", model.id, {
      confirm: requests && [
        `Unload ${model.id}?`,
        `${words.plural(requests, "request")} still ${requests === 1 ? "runs" : "run"}: what does not finish in time is ended.`,
        "Unload",
      ],
      call: () => ask("/admin/unload", { method: "POST", body: { model: model.id }, patience: 0 }),
      told: (answer) => `${model.id} is unloaded; ${words.bytes(answer.freed_bytes)} are free again.`,
    });
  }

  async remove(model) {
    const path = `/admin/models/${named(model.id)}`;
    const plan = await this.#do("remove", model.id, { call: () => ask(`${path}?dry_run=true`, { method: "DELETE" }) });
    if (!plan) return;
    await this.#do("remove", model.id, {
      confirm: [
        `Delete ${model.id} from the disk?`,
        `${words.bytes(plan.freed_bytes)} are freed. It would have to be downloaded again.`,
        "Delete",
        plan.paths,
      ],
      call: () => ask(path, { method: "DELETE", patience: 0 }),
      told: (answer) => `${model.id} is deleted; ${words.bytes(answer.freed_bytes)} are free again.`,
    });
  }

  cancel(request) {
    return this.#do("cancel", request.id, {
      confirm: [
        "Cancel this request?",
        `${request.client || "Its client"} gets no more of what ${request.model} answers.`,
        "Cancel the request",
      ],
      call: () => ask(`/admin/requests/${named(request.id)}/cancel`, { method: "POST" }),
    });
  }

  cancelJob(job) {
    return this.#do("job", job.id, {
      confirm: [`Cancel the ${job.kind}?`, `${job.model} will not be there.`, `Cancel the ${job.kind}`],
      call: () => ask(`/admin/jobs/${named(job.id)}`, { method: "DELETE" }),
    });
  }

  pull(name) {
    return this.#do("pull", "", {
      call: () => ask("/admin/download", { method: "POST", body: { model: name }, patience: 60_000 }),
      told: (job) => job.chosen?.why || `${job.model} is on its way.`,
    });
  }
}
