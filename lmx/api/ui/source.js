// One path of the API, asked again and again while the page is seen, and how old what it last said is.

import { ask, Refused } from "./server.js";
import { seconds } from "./words.js";

/** Where there is no such path, or no right to it; a new key is tried at once. */
const REFUSED_MS = 20_000;
/** Data may be so much older than the time between two questions. */
const GRACE_MS = 2000;

/** Both clocks: one stands still while a laptop sleeps, the other can be set. */
const now = () => [performance.now(), Date.now()];

export class Source {
  data = null;
  /** What went wrong last, or null. */
  error = null;
  #at = null;
  #every;
  #timer = 0;
  #asking = false;
  #running = false;
  #again = false;
  #epoch = 0;
  #changed;

  /** `every`: milliseconds, or a function of the data. `changed(source)` is called after each answer, good or bad. */
  constructor(path, every, changed) {
    this.path = path;
    this.#every = typeof every === "function" ? every : () => every;
    this.#changed = changed;
  }

  get missing() {
    return this.error instanceof Refused && this.error.missing;
  }
  get forbidden() {
    return this.error instanceof Refused && this.error.forbidden;
  }

  /** When the data were asked for, on the steady clock; null when there are none. */
  get at() {
    return this.#at?.[0] ?? null;
  }

  /** Milliseconds since then. */
  get age() {
    if (!this.#at) return null;
    const [steady, wall] = now();
    return Math.max(steady - this.#at[0], wall - this.#at[1], 0);
  }

  /** What an operator must know of data that are not fresh, and their age, in words; empty while all is well. */
  get late() {
    const { age, error } = this;
    if (!error && !(age > this.#every(this.data) + GRACE_MS)) return ["", ""];
    const shown = age === null ? "" : `What is shown is ${seconds(age / 1000)} old.`;
    return [error ? error.message : "Asking the server …", shown];
  }

  start() {
    if (this.#running) return;
    this.#running = true;
    this.soon();
  }

  stop() {
    this.#running = false;
    clearTimeout(this.#timer);
  }

  /** Ask now: something has just been changed. */
  soon() {
    clearTimeout(this.#timer);
    if (this.#asking) this.#again = true;
    else if (this.#running) this.#ask();
  }

  /** Also what is under way: it was asked for with other rights. */
  forget() {
    this.data = this.error = this.#at = null;
    this.#epoch += 1;
  }

  async #ask() {
    this.#asking = true;
    const asked = now(); // not when the answer came: it may have been made at once and sent slowly
    const epoch = this.#epoch;
    const [data, error] = await ask(this.path).then(
      (answer) => [answer, null],
      (refusal) => [null, refusal],
    );
    this.#asking = false;
    if (epoch === this.#epoch) {
      if (data) [this.data, this.#at] = [data, asked];
      if (error instanceof Refused && (error.forbidden || error.missing)) this.data = this.#at = null;
      this.error = error;
    }
    if (this.#running) {
      const wait = this.#again ? 0 : this.missing || this.forbidden ? REFUSED_MS : this.#every(this.data);
      this.#timer = setTimeout(() => this.#ask(), wait);
    }
    this.#again = false;
    this.#changed(this);
  }
}
