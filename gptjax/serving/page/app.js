// The chat page: what is shown, and what happens on a click or a key.

import { ApiError, complete, listModels, setKey } from "./api.js";
import * as conversations from "./conversations.js";
import { button, image, node } from "./elements.js";
import { preferredLanguage, setLanguage, text } from "./language.js";
import { render } from "./markdown.js";

const find = (id) => document.getElementById(id);
const SETTINGS = ["temperature", "top_p", "max_tokens", "seed", "frequency_penalty", "presence_penalty"];

const state = {
  models: [],
  all: conversations.load(),
  current: null, // the conversation that is shown
  attached: [], // images of the next message, as data URLs
  running: null, // {conversation, message, abort} of the completion that streams in
};

function notify(message) {
  find("notice").textContent = message;
  find("notice").hidden = message === "";
}

function currentModel() {
  return state.models.find((model) => model.id === state.current.model) ?? state.models[0];
}

// What is shown

function showList() {
  const items = state.all.map((conversation) => {
    const open = node("button", "title", conversations.title(conversation) || text("untitled"));
    open.addEventListener("click", () => show(conversation));
    const remove = button("delete", () => removeConversation(conversation));
    remove.textContent = "×";
    remove.title = text("delete");
    remove.setAttribute("aria-label", text("delete"));
    const isCurrent = conversation === state.current;
    if (isCurrent) open.setAttribute("aria-current", "true");
    return node("li", isCurrent ? "current" : "", open, remove);
  });
  find("list").replaceChildren(...items);
}

function show(conversation) {
  state.current = conversation;
  if (!state.models.some((model) => model.id === conversation.model)) conversation.model = state.models[0]?.id ?? null;
  find("model").value = conversation.model ?? "";
  find("system").value = conversation.system;
  for (const name of SETTINGS) find(name).value = conversation.settings[name] ?? "";
  notify("");
  showList();
  showModel();
  showMessages();
  find("input").focus();
}

function showModel() {
  const model = currentModel();
  find("attach").hidden = !model?.images;
  find("hint").textContent = model && !model.conversational ? text("continues") : text("hint");
  if (model && !model.images) attach([]);
}

function showMessages() {
  const { messages } = state.current;
  const empty = node("p", "empty", text(state.models.length > 0 ? "start" : "noModels"));
  find("messages").replaceChildren(...(messages.length > 0 ? messages.map(messageNode) : [empty]));
  showRunning();
  find("messages").scrollTop = find("messages").scrollHeight;
}

function messageNode(message) {
  const isContinuation = message.role === "assistant" && !currentModel()?.conversational;
  const kind = isContinuation ? "assistant continuation" : message.role;
  const element = node("article", `message ${kind}`, node("div", "role", text(message.role)));
  element.append(node("div", "reasoning"), node("div", "body"), node("div", "error"), node("div", "actions"));
  fillMessage(element, message, isContinuation);
  return element;
}

/** Writes a message's text and what can be done with it into its element; called again as the text grows. */
function fillMessage(element, message, isContinuation) {
  const [, reasoning, body, error, actions] = element.children;
  const isRunning = state.running?.message === message;
  if (message.reasoning) {
    const wasOpen = reasoning.querySelector("details")?.open ?? false;
    const details = node("details", "", node("summary", "", text("reasoning")), message.reasoning);
    details.open = wasOpen;
    reasoning.replaceChildren(details);
  }
  const asMarkdown = message.role === "assistant" && !isContinuation;
  body.replaceChildren(...(asMarkdown ? render(message.content) : [message.content]));
  for (const url of message.images ?? []) body.append(image(url));
  if (message.sources?.length) body.append(sourceList(message.sources));
  body.classList.toggle("waiting", isRunning && message.content === "");
  error.textContent = message.note ?? "";
  if (isRunning) return actions.replaceChildren();
  const { messages } = state.current;
  const shown = [button("copy", () => navigator.clipboard.writeText(message.content))];
  if (message.role === "user") shown.push(button("edit", () => editMessage(element, message)));
  if (message.role === "assistant" && message === messages.at(-1)) shown.push(button("regenerate", regenerate));
  if (message.usage) shown.push(node("span", "quiet", text("tokens")(message.usage)));
  actions.replaceChildren(...shown);
}

/** The passages that an answer is based on. */
function sourceList(sources) {
  const items = sources.map(({ number, place, text: passage }) => node("p", "", `[${number}] ${place}\n${passage}`));
  return node("details", "sources", node("summary", "", text("sources")), ...items);
}

function showSettings(shown) {
  find("settings").hidden = !shown;
  find("toggle-settings").setAttribute("aria-expanded", String(shown));
}

function showRunning() {
  const isRunning = state.running?.conversation === state.current;
  find("send").hidden = isRunning;
  find("stop").hidden = !isRunning;
  find("send").disabled = state.running !== null || state.models.length === 0;
}

// What happens

function store(conversation) {
  if (!state.all.includes(conversation)) state.all.unshift(conversation);
  if (!conversations.save(conversation)) notify(text("notSaved"));
  showList();
}

function newConversation() {
  show(conversations.create(state.current));
}

function removeConversation(conversation) {
  if (state.running?.conversation === conversation) stop();
  conversations.remove(conversation);
  state.all = state.all.filter((other) => other !== conversation);
  if (conversation === state.current) show(state.all[0] ?? conversations.create(conversation));
  else showList();
}

function send() {
  const content = find("input").value;
  const wrong = SETTINGS.map(find).find((field) => !field.checkValidity());
  if (wrong) {
    showSettings(true);
    wrong.reportValidity();
    return;
  }
  if ((content.trim() === "" && state.attached.length === 0) || state.running || state.models.length === 0) return;
  state.current.messages.push({ role: "user", content, images: state.attached });
  find("input").value = "";
  fitInput();
  attach([]);
  answer();
}

function regenerate() {
  if (state.running) return;
  state.current.messages.pop();
  answer();
}

/** Replaces a message of the user by a text area; on saving, what came after it is dropped and answered anew. */
function editMessage(element, message) {
  if (state.running) return;
  const area = node("textarea", "");
  area.value = message.content;
  const save = () => {
    const { messages } = state.current;
    message.content = area.value;
    messages.length = messages.indexOf(message) + 1;
    answer();
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") showMessages();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      save();
    }
  });
  element.children[2].replaceChildren(area);
  element.children[4].replaceChildren(button("save", save), button("cancel", showMessages));
  area.focus();
}

/** Requests the completion of the current conversation, and shows it as it streams in. */
async function answer() {
  const conversation = state.current;
  const model = currentModel();
  const input = conversations.apiMessages(conversation);
  const message = { role: "assistant", content: "" };
  conversation.messages.push(message);
  state.running = { conversation, message, abort: new AbortController() };
  notify("");
  store(conversation);
  showMessages();
  try {
    for await (const piece of completeShortened(model, input, conversation.settings, state.running.abort.signal)) {
      message.content += piece.content ?? "";
      if (piece.reasoning) message.reasoning = (message.reasoning ?? "") + piece.reasoning;
      if (piece.sources) message.sources = piece.sources;
      if (piece.usage) message.usage = piece.usage;
      if (piece.finishReason === "length") message.note = text("length");
      refresh(conversation, message, model);
    }
  } catch (error) {
    message.note = error.name === "AbortError" ? text("stopped") : explain(error);
  }
  state.running = null;
  // A completion that was deleted with its conversation, or that never began, is not kept.
  if (message.content === "" && !message.reasoning && message.note) {
    conversation.messages.pop();
    if (conversation === state.current) notify(message.note);
  }
  if (state.all.includes(conversation)) store(conversation);
  if (conversation === state.current) showMessages();
  else showRunning();
}

/** The pieces of `complete`; the oldest turns are left out where all of them exceed the context. */
async function* completeShortened(model, messages, settings, signal) {
  try {
    yield* complete(model, messages, settings, signal);
  } catch (error) {
    const users = messages.flatMap((message, i) => (message.role === "user" ? [i] : []));
    if (error.code !== "context_length_exceeded" || users.length < 2) throw error;
    notify(text("shortened"));
    const system = messages.filter((message) => message.role === "system");
    yield* completeShortened(model, [...system, ...messages.slice(users[1])], settings, signal);
  }
}

/** Shows the new text of a message once a frame; the view follows the text if it was at its end. */
function refresh(conversation, message, model) {
  if (conversation !== state.current || state.running.frame) return;
  state.running.frame = requestAnimationFrame(() => {
    if (state.running?.message !== message) return;
    state.running.frame = undefined;
    const box = find("messages");
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    fillMessage(box.lastElementChild, message, !model.conversational);
    if (isAtEnd) box.scrollTop = box.scrollHeight;
  });
}

function explain(error) {
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401) askKey();
  return error.status === 0 ? text("unreachable") : error.message;
}

function stop() {
  state.running?.abort.abort();
}

// Images

function attach(urls) {
  state.attached = urls;
  const shown = urls.map((url) => {
    const element = image(url);
    element.title = text("remove");
    element.addEventListener("click", () => attach(state.attached.filter((other) => other !== url)));
    return element;
  });
  find("attachments").replaceChildren(...shown);
}

async function attachFiles(files) {
  if (!currentModel()?.images) return;
  for (const file of files) {
    const reader = new FileReader();
    const url = await new Promise((resolve) => {
      reader.addEventListener("load", () => resolve(reader.result));
      reader.readAsDataURL(file);
    });
    const isImage = await image(url).decode().then(() => true, () => false);
    if (isImage) attach([...state.attached, url]);
    else notify(`${file.name} ${text("notImage")}`);
  }
}

// Start

function askKey() {
  const dialog = find("key-dialog");
  dialog.addEventListener(
    "close",
    () => {
      if (dialog.returnValue !== "save") return;
      setKey(find("key").value);
      loadModels();
    },
    { once: true },
  );
  if (!dialog.open) dialog.showModal();
}

async function loadModels() {
  try {
    state.models = await listModels();
  } catch (error) {
    notify(explain(error));
  }
  const options = state.models.map((model) => {
    const option = node("option", "", model.id);
    option.value = model.id;
    return option;
  });
  find("model").replaceChildren(...options);
  show(state.current ?? state.all[0] ?? conversations.create());
}

function fitInput() {
  const input = find("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

/** Connects a select with a stored preference. */
function preference(id, initial, apply) {
  const select = find(id);
  select.value = localStorage.getItem(`gptjax.${id}`) ?? initial;
  apply(select.value);
  select.addEventListener("change", () => {
    localStorage.setItem(`gptjax.${id}`, select.value);
    apply(select.value);
  });
}

function listen() {
  const on = (id, event, action) => find(id).addEventListener(event, action);
  on("new", "click", newConversation);
  on("stop", "click", stop);
  on("input", "input", fitInput);
  on("toggle-sidebar", "click", () => document.body.classList.toggle("sidebar"));
  on("toggle-settings", "click", () => showSettings(find("settings").hidden));
  on("model", "change", () => {
    state.current.model = find("model").value;
    showModel();
    showMessages();
  });
  on("system", "input", () => (state.current.system = find("system").value));
  for (const name of SETTINGS) {
    on(name, "input", () => {
      const { value } = find(name);
      if (value === "" || !find(name).checkValidity()) delete state.current.settings[name];
      else state.current.settings[name] = Number(value);
    });
  }
  on("composer", "submit", (event) => {
    event.preventDefault();
    send();
  });
  on("input", "keydown", (event) => {
    if (event.isComposing) return; // Enter chooses a word of the input method
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      send();
    } else if (event.key === "ArrowUp" && find("input").value === "" && !state.running) {
      const last = state.current.messages.findLastIndex((message) => message.role === "user");
      if (last >= 0) editMessage(find("messages").children[last], state.current.messages[last]);
    }
  });
  on("attach", "click", () => find("file").click());
  on("file", "change", () => {
    attachFiles([...find("file").files]);
    find("file").value = "";
  });
  on("input", "paste", (event) => attachFiles(event.clipboardData.files));
  on("composer", "dragover", (event) => event.preventDefault());
  on("composer", "drop", (event) => {
    event.preventDefault();
    attachFiles(event.dataTransfer.files);
  });
  window.addEventListener("pagehide", () => state.running && store(state.running.conversation)); // what has come so far
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    if (event.altKey && event.code === "KeyN") {
      event.preventDefault();
      newConversation();
    }
  });
}

preference("theme", "auto", setTheme);
preference("language", preferredLanguage(), (language) => {
  setLanguage(language);
  if (state.current) show(state.current);
});
listen();
loadModels();
