// Lines and stacked areas over the last five minutes, drawn by hand as SVG. Where nothing was measured there is a gap.

import { attribute, el, keyed, say } from "./dom.js";

export const SPAN_MS = 300_000;
/** Two samples further apart than this were not measured in one go: no line joins them. */
const GAP_MS = 3500;
const WIDTH = 1000;
const HEIGHT = 100;
const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** The next of 1, 2, 5, 10, 20 … */
function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value) * power;
}

/**
 * A sample is `{at, values: Map(name → number), dashed: Map}`; `stacked`: areas on each other, their sum is the figure.
 * `format` writes a value; `colour` gives a name's.
 */
export class Plot {
  #samples = [];
  #cursor = null;

  constructor(root, { stacked = false, format, colour, about }) {
    Object.assign(this, { stacked, format, colour, about });
    this.figure = el("p", { class: "figure" });
    this.note = el("p", { class: "quiet note" });
    this.drawing = svg("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      "aria-hidden": "true",
    });
    this.lines = svg("g", {});
    this.mark = svg("line", { y1: 0, y2: HEIGHT, class: "cursor", visibility: "hidden" });
    this.drawing.append(
      ...[0.5, HEIGHT / 2, HEIGHT - 0.5].map((y) => svg("line", { x1: 0, x2: WIDTH, y1: y, y2: y, class: "grid" })),
      this.lines,
      this.mark,
    );
    this.top = el("span", { class: "top" });
    this.tip = el("div", { class: "tip", hidden: true });
    this.canvas = el("div", { class: "canvas", role: "img", tabindex: "0" }, this.drawing, this.top, this.tip);
    this.canvas.addEventListener("pointermove", (event) => this.#point(event.clientX));
    this.canvas.addEventListener("pointerleave", () => this.#leave());
    this.canvas.addEventListener("blur", () => this.#leave());
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    root.append(
      this.figure,
      this.canvas,
      el("div", { class: "axis quiet", "aria-hidden": "true" }, el("span", {}, "5 min ago"), el("span", {}, "now")),
      this.note,
    );
  }

  /** `sample.anew`: no line joins it to the one before. */
  add(sample) {
    this.#samples.push(sample);
    const first = this.#samples.findIndex((other) => other.at > sample.at - SPAN_MS - GAP_MS);
    if (first > 0) this.#samples.splice(0, first);
  }

  draw(now, figure, note) {
    const samples = this.#samples;
    const names = [...new Set(samples.flatMap((sample) => [...sample.values.keys()]))];
    const heights = samples.flatMap((sample) =>
      this.stacked ? [sum(sample.values)] : [...sample.values.values(), ...sample.dashed.values()],
    );
    const most = ceiling(Math.max(0, ...heights));
    const x = (sample) => (WIDTH * (1 - (now - sample.at) / SPAN_MS)).toFixed(1);
    const y = (value) => (HEIGHT * (1 - value / most)).toFixed(1);
    const paths = [];
    names.forEach((name, index) => {
      const colour = this.colour(name);
      if (this.stacked) {
        const below = names.slice(0, index);
        const base = (sample) => below.reduce((total, other) => total + (sample.values.get(other) ?? 0), 0);
        const runs = this.#runs(() => true);
        const upper = runs.map((run) => run.map((s) => `${x(s)} ${y(base(s) + (s.values.get(name) ?? 0))}`));
        const lower = runs.map((run) => run.map((s) => `${x(s)} ${y(base(s))}`).reverse());
        paths.push({
          id: `${name} area`,
          class: `area c${colour}`,
          d: upper.map((run, i) => `M${[...run, ...lower[i]].join("L")}Z`).join(""),
        });
        paths.push({ id: name, class: `line c${colour}`, d: upper.map((run) => `M${run.join("L")}`).join("") });
      } else {
        for (const kind of ["dashed", "values"]) {
          const runs = this.#runs((sample) => sample[kind].has(name));
          paths.push({
            id: `${name} ${kind}`,
            class: `line c${colour} ${kind}`,
            d: runs.map((run) => `M${run.map((s) => `${x(s)} ${y(s[kind].get(name))}`).join("L")}`).join(""),
          });
        }
      }
    });
    keyed(
      this.lines,
      paths,
      (path) => path.id,
      () => svg("path", { "vector-effect": "non-scaling-stroke" }),
      (element, path) => {
        attribute(element, "class", path.class);
        attribute(element, "d", path.d);
      },
    );
    say(this.top, this.format(most));
    say(this.figure, figure);
    say(this.note, note);
    attribute(
      this.canvas,
      "aria-label",
      `${this.about}, last five minutes. Now ${figure}; scale to ${this.format(most)}.`,
    );
    this.now = now;
    this.#show();
  }

  /** Samples that belong together. */
  #runs(has) {
    const runs = [];
    let last = null;
    for (const sample of this.#samples) {
      if (!has(sample)) last = null;
      else {
        if (!last || sample.at - last.at > GAP_MS || sample.anew) runs.push([]);
        runs.at(-1).push(sample);
        last = sample;
      }
    }
    return runs;
  }

  #point(clientX) {
    const box = this.canvas.getBoundingClientRect();
    const at = this.now - SPAN_MS * (1 - (clientX - box.left) / box.width);
    this.#cursor = this.#samples.reduce(
      (best, sample) => (!best || Math.abs(sample.at - at) < Math.abs(best.at - at) ? sample : best),
      null,
    );
    this.#show();
  }

  #key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") this.#leave();
    if (!step || !this.#samples.length) return;
    event.preventDefault();
    const last = this.#samples.length - 1;
    const index = this.#cursor ? this.#samples.indexOf(this.#cursor) : last + 1;
    this.#cursor = this.#samples[Math.min(last, Math.max(0, index + step))];
    this.#show();
  }

  #leave() {
    this.#cursor = null;
    this.#show();
  }

  #show() {
    const sample = this.#samples.includes(this.#cursor) ? this.#cursor : null;
    this.tip.hidden = !sample;
    attribute(this.mark, "visibility", sample ? "visible" : "hidden");
    if (!sample) return;
    const share = Math.min(1, Math.max(0, 1 - (this.now - sample.at) / SPAN_MS));
    attribute(this.mark, "x1", share * WIDTH);
    attribute(this.mark, "x2", share * WIDTH);
    this.tip.classList.toggle("left", share > 0.5);
    this.tip.style.left = `${share * 100}%`;
    const ago = Math.round((this.now - sample.at) / 1000);
    const rows = [...sample.values].map(([name, value]) => ({
      name,
      text: this.format(value) + (sample.dashed.has(name) ? ` … ${this.format(sample.dashed.get(name))}` : ""),
    }));
    rows.unshift({ name: "", text: ago ? `${ago} s ago` : "now" });
    keyed(
      this.tip,
      rows,
      (row) => row.name,
      (row) =>
        el(
          "div",
          {},
          el("i", { class: row.name ? `swatch c${this.colour(row.name)}` : "" }),
          el("b", {}),
          el("span", {}, row.name),
        ),
      (element, row) => say(element.children[1], row.text),
    );
  }
}

function sum(values) {
  let total = 0;
  for (const value of values.values()) total += value;
  return total;
}
