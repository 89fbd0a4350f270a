// Elements that the page creates.

import { text } from "./language.js";

export function node(name, className, ...children) {
  const element = document.createElement(name);
  element.className = className;
  element.append(...children);
  return element;
}

export function button(label, onClick) {
  const element = node("button", "small", text(label));
  element.type = "button";
  element.addEventListener("click", onClick);
  return element;
}

export function image(url, className = "") {
  const element = node("img", className);
  element.src = url;
  element.alt = "";
  return element;
}
