// Makes elements. Text from records only becomes text nodes: no script parses it as HTML.

const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// attributes: "on..." are event listeners, true is an attribute without value; null, undefined and false are left out.
// Children that are null, undefined or "" are left out too.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

// "1 row", "1,234 rows".
function countOf(number, one, many) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

// Text that breaks only between words, where a browser would also break after "-" and "--".
function wordsOf(text) {
  return text.split(" ").flatMap((word, index) => [index ? " " : "", el("span", { class: "word" }, word)]);
}

// The parts of a value's text as children of an element. "3.27 [3.21, 3.33]": the interval in smaller type, and on a
// separate line where there is no room.
function valueParts(text) {
  const at = text.indexOf(" [");
  return at < 0 ? [text] : [text.slice(0, at), el("span", { class: "interval" }, text.slice(at))];
}

// Numbers on axes and in tips: short, and never "1e+21".
function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e7 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
}
