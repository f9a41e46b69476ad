// Questions to the server. The operator's key is kept in this tab's session storage, and sent nowhere else.

const KEY = "headrace-operator-key";
const WAIT_MS = 12000;

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, body, method = body === undefined ? "GET" : "POST") {
  const headers = { Accept: "application/json" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(new URL(`../admin/${path}`, location.href), {
    method, headers, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store",
    credentials: "omit", redirect: "error", signal: AbortSignal.timeout(WAIT_MS),
  });
  let answer = null;
  try { answer = await response.json(); } catch { /* a proxy's page, or nothing */ }
  if (!response.ok) throw new Refused(response.status, answer?.error?.message ?? `HTTP ${response.status}`);
  if (answer === null) throw new Refused(response.status, "the answer is no JSON");
  return answer;
}
