// The texts of the page in English and Chinese.

const TEXTS = {
  en: {
    conversations: "Conversations",
    new: "New",
    newHint: "New conversation (Alt+N)",
    language: "Language",
    theme: "Theme",
    auto: "System",
    light: "Light",
    dark: "Dark",
    model: "Model",
    settings: "Settings",
    system: "System prompt",
    temperature: "Temperature",
    topP: "Top-p",
    maxTokens: "Maximum tokens",
    seed: "Seed",
    frequencyPenalty: "Frequency penalty",
    presencePenalty: "Presence penalty",
    automatic: "automatic",
    random: "random",
    messages: "Messages",
    message: "Message",
    send: "Send",
    stop: "Stop",
    attach: "Add image",
    remove: "Remove",
    save: "Save",
    cancel: "Cancel",
    edit: "Edit",
    copy: "Copy",
    regenerate: "Regenerate",
    delete: "Delete",
    reasoning: "Reasoning",
    sources: "Sources",
    user: "You",
    assistant: "Model",
    untitled: "New conversation",
    hint: "Enter sends, Shift+Enter breaks the line, Esc stops",
    continues: "This model was not trained on conversations: it continues the text.",
    start: "Write a message to begin.",
    keyNeeded: "This server needs an API key.",
    noModels: "The server has no model for text.",
    length: "The limit of tokens was reached.",
    stopped: "Stopped.",
    shortened: "The oldest messages do not fit into the context of the model: they are left out.",
    notSaved: "The browser's storage is full: this conversation is not kept. Delete old ones.",
    notImage: "is not an image that the browser can read.",
    unreachable: "The server does not answer.",
    tokens: (usage) => `${usage.prompt_tokens} + ${usage.completion_tokens} tokens`,
  },
  zh: {
    conversations: "对话",
    new: "新建",
    newHint: "新建对话（Alt+N）",
    language: "语言",
    theme: "主题",
    auto: "跟随系统",
    light: "浅色",
    dark: "深色",
    model: "模型",
    settings: "设置",
    system: "系统提示词",
    temperature: "温度",
    topP: "Top-p",
    maxTokens: "最大词元数",
    seed: "随机种子",
    frequencyPenalty: "频率惩罚",
    presencePenalty: "存在惩罚",
    automatic: "自动",
    random: "随机",
    messages: "消息",
    message: "消息",
    send: "发送",
    stop: "停止",
    attach: "添加图片",
    remove: "移除",
    save: "保存",
    cancel: "取消",
    edit: "编辑",
    copy: "复制",
    regenerate: "重新生成",
    delete: "删除",
    reasoning: "推理过程",
    sources: "来源",
    user: "你",
    assistant: "模型",
    untitled: "新对话",
    hint: "Enter 发送，Shift+Enter 换行，Esc 停止",
    continues: "此模型未经对话训练：它会续写文本。",
    start: "输入消息，开始对话。",
    keyNeeded: "此服务器需要 API 密钥。",
    noModels: "服务器没有可用的文本模型。",
    length: "已达到词元数上限。",
    stopped: "已停止。",
    shortened: "最早的消息超出模型的上下文长度，已省略。",
    notSaved: "浏览器存储空间已满：此对话不会被保存。请删除旧对话。",
    notImage: "不是浏览器可以读取的图片。",
    unreachable: "服务器没有响应。",
    tokens: (usage) => `${usage.prompt_tokens} + ${usage.completion_tokens} 个词元`,
  },
};

let language = "en";

/** The text of the current language. */
export function text(name) {
  return TEXTS[language][name];
}

/** Sets the language and fills in every element with data-text, data-title, data-label or data-placeholder. */
export function setLanguage(chosen) {
  language = chosen in TEXTS ? chosen : "en";
  document.documentElement.lang = language;
  const fill = (attribute, set) => {
    for (const element of document.querySelectorAll(`[data-${attribute}]`)) {
      set(element, text(element.dataset[attribute]));
    }
  };
  fill("text", (element, value) => (element.textContent = value));
  fill("title", (element, value) => (element.title = value));
  fill("label", (element, value) => element.setAttribute("aria-label", value));
  fill("placeholder", (element, value) => (element.placeholder = value));
}

/** The language that the browser prefers. */
export function preferredLanguage() {
  return navigator.language.startsWith("zh") ? "zh" : "en";
}
