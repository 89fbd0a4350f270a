// The conversations, kept in the browser's local storage, one entry each.
//
// A conversation: {id, updated, model, system, settings: {name: number}, messages}; a message: {role, content,
// images: [data URL], reasoning, sources, note, usage}, where `content` is text and what follows it may be missing.

const PREFIX = "gptjax.conversation.";

/** All conversations, the last used first. */
export function load() {
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  const parsed = keys.map((key) => {
    try {
      return JSON.parse(localStorage.getItem(key));
    } catch {
      return null; // written by something else
    }
  });
  return parsed.filter((each) => Array.isArray(each?.messages)).sort((a, b) => b.updated - a.updated);
}

/** A new conversation with the model, system prompt and settings of `last`, or the defaults. It is not stored yet. */
export function create(last) {
  const id = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`; // randomUUID needs HTTPS or localhost
  const { model = null, system = "", settings = {} } = last ?? {};
  return { id, updated: Date.now(), model, system, settings: { ...settings }, messages: [] };
}

/** Stores a conversation; returns whether there was room for it. */
export function save(conversation) {
  conversation.updated = Date.now();
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export function remove(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}

/** The first line of the first message; empty: there is none. */
export function title(conversation) {
  return conversation.messages[0]?.content.trim().split("\n")[0].slice(0, 60) ?? "";
}

/** The messages as the API takes them. */
export function apiMessages(conversation) {
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const messages = conversation.messages.map(({ role, content, images }) => {
    if (!images?.length) return { role, content };
    const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
    return { role, content: [...parts, { type: "text", text: content }] };
  });
  return [...system, ...messages];
}
