// Asks lmx's API and says in words what went wrong. The admin key lives in sessionStorage, and nowhere else.

const KEY = "lmx-admin-key";
const PATIENCE_MS = 5000;

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server answered instead of what was asked for. */
export class Refused extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code ?? "";
  }
  get forbidden() {
    return this.status === 401 || this.status === 403;
  }
  /** There is no such path: this server is older than the page expects. */
  get missing() {
    return this.status === 404 && this.code === "unknown_url";
  }
}

/** Nobody answered, or not in time, or somebody who is not lmx. */
export class Unreachable extends Error {}

/** The JSON that `path` answers. Throws Refused or Unreachable. `patience` 0: for as long as it takes. */
export async function ask(path, { method = "GET", body, patience = PATIENCE_MS } = {}) {
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  // A header is bytes: letters outside ASCII go as UTF-8.
  if (key.get()) headers.authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key.get()))}`;
  let response, text;
  try {
    response = await fetch(path, {
      method,
      headers,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: patience ? AbortSignal.timeout(patience) : undefined,
    });
    text = await response.text();
  } catch (error) {
    throw new Unreachable(
      error.name === "TimeoutError"
        ? `The server did not answer within ${patience / 1000} s.`
        : "The server does not answer.",
    );
  }
  let answer;
  try {
    answer = JSON.parse(text);
  } catch {
    throw response.ok
      ? new Unreachable("What answers here is not lmx.")
      : new Refused(response.status, { message: `The server answered ${response.status} ${response.statusText}.` });
  }
  if (response.ok) return answer;
  throw new Refused(
    response.status,
    answer?.error?.message ? answer.error : { message: `The server answered ${response.status}.` },
  );
}
