"use strict";
// What the pages draw with. Texts only ever enter a document through textContent.
const SVG = document.getElementById("svg-root").namespaceURI;
const byId = (id) => document.getElementById(id);

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") made.textContent = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "style") made.style.cssText = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function shape(tag, attributes = {}, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// 1.5e-7 as 1.5·10⁻⁷
function power(value) {
  const [mantissa, exponent] = value.toExponential(2).split("e").map(Number);
  const ten = `10${[...String(exponent)].map((sign) => sign === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[sign]).join("")}`;
  return mantissa === 1 ? ten : `${mantissa}·${ten}`;
}
