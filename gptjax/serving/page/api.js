// The server's HTTP API: models, and streamed completions.

/** An answer other than 2xx, or an error in mid-stream; `status` is 0 if the server did not answer. */
export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

function headers() {
  const key = sessionStorage.getItem("gptjax.key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

export function setKey(key) {
  sessionStorage.setItem("gptjax.key", key);
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("", 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new ApiError(body.error?.message ?? response.statusText, response.status, body.error?.code);
}

/** The models of the server that generate text: [{id, max_model_len, conversational, images}]. */
export async function listModels() {
  const response = await request("v1/models", {});
  const { data } = await response.json();
  return data.filter((model) => model.task === undefined);
}

/** Yields the objects of a server-sent event stream until its [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError("", 0); // the stream ends with [DONE]
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data === "") continue; // a comment keeps the connection open
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message, 200);
      yield event;
    }
  }
}

/**
 * Streams the completion of a conversation, or of one text for a model that was not trained on conversations.
 *
 * Yields {content, reasoning, finishReason, usage, sources}, each present only where the event has it.
 */
export async function* complete(model, messages, settings, signal) {
  const chat = model.conversational;
  const { max_tokens, ...rest } = settings;
  const limit = chat
    ? { max_completion_tokens: max_tokens } // undefined is left out of JSON: as many as fit
    : { max_tokens: max_tokens ?? Math.min(256, Math.ceil(model.max_model_len / 4)) };
  const turns = messages.filter((message) => message.role !== "system");
  const input = chat ? { messages } : { prompt: turns.map((message) => message.content).join("") };
  const body = { model: model.id, ...input, ...rest, ...limit, stream: true, stream_options: { include_usage: true } };
  const path = chat ? "v1/chat/completions" : "v1/completions";
  const response = await request(path, { method: "POST", body: JSON.stringify(body), signal });
  for await (const event of events(response)) {
    const choice = event.choices[0];
    yield {
      content: choice?.delta?.content ?? choice?.text,
      reasoning: choice?.delta?.reasoning,
      finishReason: choice?.finish_reason,
      usage: event.usage,
      sources: event.sources,
    };
  }
}
