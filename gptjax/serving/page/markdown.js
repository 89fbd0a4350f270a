// Markdown to DOM nodes. A model's text never becomes HTML: every string ends up in a text node or a checked URL.

const SAFE_LINK = /^(https?:|mailto:)/i;
// Code, bold, italics, strikethrough and links; in this order, the first alternative that matches at a place wins.
const INLINE =
  /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?)\*\*|(?<![\w*])\*(?=\S)([^*]+?)\*(?![\w*])|(?<!\w)_(?=\S)([^_]+?)_(?!\w)|~~(.+?)~~|\[([^\]]*)\]\(((?:[^()\s]|\([^()\s]*\))+)\)|\\([\\`*_~[\]#|>-])/s;

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function link(label, url) {
  if (!SAFE_LINK.test(url)) return label;
  const node = element("a", ...inline(label));
  node.href = url;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}

/** The nodes of a text without blocks. */
function inline(text) {
  const nodes = [];
  for (let match; (match = INLINE.exec(text)) !== null; text = text.slice(match.index + match[0].length)) {
    nodes.push(text.slice(0, match.index));
    const [, , code, bold, star, underscore, strike, label, url, escaped] = match;
    if (code !== undefined) nodes.push(element("code", code));
    else if (bold !== undefined) nodes.push(element("strong", ...inline(bold)));
    else if (star !== undefined || underscore !== undefined) nodes.push(element("em", ...inline(star ?? underscore)));
    else if (strike !== undefined) nodes.push(element("del", ...inline(strike)));
    else if (url !== undefined) nodes.push(link(label, url));
    else nodes.push(escaped);
  }
  return [...nodes, text];
}

const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+-]*)/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^\s*>\s?(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

function fenced(lines) {
  const [, fence] = FENCE.exec(lines.shift());
  const code = [];
  while (lines.length > 0) {
    const line = lines.shift();
    if (line.trim().startsWith(fence)) break; // without it, while the text streams in, the rest is code
    code.push(line);
  }
  return element("pre", element("code", code.join("\n")));
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
}

function table(lines) {
  const row = (name, line) => element("tr", ...cells(line).map((cell) => element(name, ...inline(cell))));
  const head = element("thead", row("th", lines.shift()));
  lines.shift();
  const body = element("tbody");
  while (lines.length > 0 && lines[0].includes("|")) body.append(row("td", lines.shift()));
  return element("table", head, body);
}

function list(lines) {
  const [, indent, marker] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(marker);
  const node = element(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(marker, 10);
  while (lines.length > 0) {
    const match = ITEM.exec(lines[0]);
    if (match === null || match[1].length < indent.length || /\d/.test(match[2]) !== ordered) break;
    lines.shift();
    // The lines that are indented further belong to the item; they lose the indentation of its text.
    const width = match[0].length - match[3].length;
    const inner = [match[3]];
    while (lines.length > 0 && (/^\s*$/.test(lines[0]) ? /^\s/.test(lines[1] ?? "") : /^\s/.test(lines[0]))) {
      const next = ITEM.exec(lines[0]);
      if (next !== null && next[1].length <= indent.length) break;
      inner.push(lines.shift().replace(new RegExp(`^\\s{0,${width}}`), ""));
    }
    const children = blocks(inner);
    const isTight = children[0]?.tagName === "P";
    node.append(element("li", ...(isTight ? [...children[0].childNodes, ...children.slice(1)] : children)));
    while (lines.length > 1 && /^\s*$/.test(lines[0]) && ITEM.test(lines[1])) lines.shift();
  }
  return node;
}

function beginsBlock(lines) {
  return (
    [FENCE, HEADING, RULE, ITEM, QUOTE].some((pattern) => pattern.test(lines[0])) ||
    (lines[0].includes("|") && TABLE_RULE.test(lines[1] ?? ""))
  );
}

function blocks(lines) {
  const nodes = [];
  while (lines.length > 0) {
    const line = lines[0];
    if (/^\s*$/.test(line)) {
      lines.shift();
    } else if (FENCE.test(line)) {
      nodes.push(fenced(lines));
    } else if (HEADING.test(line)) {
      const [, marks, text] = HEADING.exec(lines.shift());
      nodes.push(element(`h${marks.length}`, ...inline(text)));
    } else if (RULE.test(line)) {
      lines.shift();
      nodes.push(element("hr"));
    } else if (QUOTE.test(line)) {
      const quoted = [];
      while (lines.length > 0 && QUOTE.test(lines[0])) quoted.push(QUOTE.exec(lines.shift())[1]);
      nodes.push(element("blockquote", ...blocks(quoted)));
    } else if (ITEM.test(line)) {
      nodes.push(list(lines));
    } else if (line.includes("|") && TABLE_RULE.test(lines[1] ?? "")) {
      nodes.push(table(lines));
    } else {
      const paragraph = [lines.shift()];
      while (lines.length > 0 && !/^\s*$/.test(lines[0]) && !beginsBlock(lines)) paragraph.push(lines.shift());
      const parts = paragraph.flatMap((part, i) => [...(i > 0 ? [element("br")] : []), ...inline(part)]);
      nodes.push(element("p", ...parts));
    }
  }
  return nodes;
}

/** Renders a subset of CommonMark with tables: nodes to append to an element. */
export function render(markdown) {
  return blocks(markdown.replaceAll("\r\n", "\n").split("\n"));
}
