// Requests to the server: what it serves, and one answer as a stream of events.

/** status: of the HTTP answer, undefined where there was none. code: the server's word for what is wrong. */
export class ServerError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Model, method of the drafter (null for none), and how long prompts and answers may be. */
export async function about(key) {
  return (await ask("/v1/ctc/about", { headers: headers(key) })).json();
}

/** Calls `onEvent(name, data)` for every server-sent event of an answer. */
export async function stream(request, key, signal, onEvent) {
  const response = await ask("/v1/ctc/stream", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const parser = eventParser(onEvent);
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      parser(decoder.decode(value, { stream: true }));
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("The connection to the server was lost.");
  }
}

/** A function that takes text in pieces of any size and reports whole events. */
export function eventParser(onEvent) {
  let rest = "";
  return (text) => {
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      if (fields.data) onEvent(fields.event ?? "message", JSON.parse(fields.data));
    }
  };
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.");
  }
  if (response.ok) return response;
  if (response.status === 401) throw new ServerError("The server wants its API key; it goes into the settings below.", 401);
  const body = await response.json().catch(() => null);
  throw new ServerError(body?.error?.message ?? `The server answered ${response.status}.`, response.status, body?.error?.code);
}
