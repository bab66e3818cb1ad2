// The server of this page: requests, its errors in one form, the key, and streams of events.

import { askKey } from "./dialogs.js";

/** An error of the server: what is wrong, and an action that helps. */
export class ServerError extends Error {
  constructor(status, error) {
    const [message, ...hints] = String(error?.message ?? `the server answered ${status}`).split("; ");
    super(message);
    this.status = status;
    this.hint = hints.join("; ");
    this.type = error?.type ?? "";
    this.tokens = error?.n_prompt_tokens;
    this.window = error?.n_ctx;
  }
}

/** The server cannot be reached. */
export class Unreachable extends Error {}

let key = null;
try {
  key = sessionStorage.getItem("desk.key");
} catch {
  // storage is off: the key is asked for again after a reload
}

let asked = null;

async function newKey(wrong) {
  asked ??= askKey(wrong).finally(() => (asked = null));
  const given = await asked;
  if (given === null) return false;
  key = given;
  try {
    sessionStorage.setItem("desk.key", key);
  } catch {
    // as above
  }
  return true;
}

let onUnreachable = () => {};
export const whenUnreachable = (listener) => (onUnreachable = listener);

async function errorOf(answer) {
  const said = await answer.json().catch(() => null);
  return new ServerError(answer.status, said?.error);
}

/** Send a request; ask for the key where the server wants one. Returns the response if it is a good one. */
export async function request(path, { method = "GET", json, body, signal } = {}) {
  for (let tries = 0; ; tries++) {
    const used = key;
    const headers = {};
    if (used) headers.Authorization = `Bearer ${used}`;
    if (json !== undefined) headers["Content-Type"] = "application/json";
    let answer;
    try {
      answer = await fetch(path, { method, headers, signal, body: json === undefined ? body : JSON.stringify(json) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      onUnreachable();
      throw new Unreachable("the server does not answer");
    }
    if (answer.ok) return answer;
    if (answer.status !== 401) throw await errorOf(answer);
    if (used === key && !(await newKey(Boolean(used)))) throw await errorOf(answer);
  }
}

export const getJson = async (path, options) => (await request(path, options)).json();

/** Yield the JSON of each event of a stream, until it ends or says [DONE]. */
export async function* events(path, options) {
  const answer = await request(path, options);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        onUnreachable();
        throw new Unreachable("the connection to the server broke");
      }
      if (part.done) return;
      const lines = (rest + part.value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error && typeof event.error === "object") throw new ServerError(200, event.error);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const documentPath = (id, rest = "") => `v1/documents/${encodeURIComponent(id)}${rest}`;
