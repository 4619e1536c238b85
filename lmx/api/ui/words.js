// Figures as people read them.

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (value) => number.format(value ?? 0);

/** "1 stream", "2 streams" */
export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

/** Three figures, in powers of 1,024. */
export function bytes(value) {
  if (value == null) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (value = Math.abs(value); value >= 1000 && unit < 4; unit++) value /= 1024;
  return `${short(value)} ${units[unit]}`;
}

/** Three figures at most: 0.12, 4.6, 58, 1,204. */
export function short(value) {
  if (value == null) return "–";
  return value >= 100 || value === 0
    ? count(value)
    : value >= 10
      ? value.toFixed(value % 1 >= 0.05 ? 1 : 0)
      : value.toFixed(value >= 1 ? 1 : 2);
}

export const milliseconds = (value) =>
  value == null ? "–" : value < 1000 ? `${short(value)} ms` : seconds(value / 1000);

export function seconds(value) {
  if (value == null) return "–";
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  if (value < 172800) return `${Math.round(value / 3600)} h`;
  return `${count(value / 86400)} d`;
}

/** 7.6B, 135M */
export function parameters(value) {
  if (!value) return "";
  const [unit, size] = value >= 1e12 ? ["T", 1e12] : value >= 1e9 ? ["B", 1e9] : value >= 1e6 ? ["M", 1e6] : ["k", 1e3];
  return `${short(value / size)}${unit}`;
}

/** 8192 → "8k" */
export const context = (value) => (value ? `${value >= 1024 ? `${short(value / 1024)}k` : value} context` : "");

/** Parts that are there, with a dot between. */
export const list = (...parts) => parts.filter(Boolean).join(" · ");
