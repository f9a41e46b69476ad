// Text into the page, and numbers into text. Whatever comes from a server, a model or a client becomes a text node.

export const byId = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.map(String));
  return made;
}

export function holding(tag, attributes, ...nodes) {
  const made = element(tag, attributes);
  made.append(...nodes);
  return made;
}

export function drawn(tag, attributes, ...nodes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...nodes);
  return made;
}

export function write(node, text) {
  const said = text ?? "–";
  if (node.textContent !== String(said)) node.textContent = said; // an unchanged text is not read out again
}

const digits = (value, count) => Number(value.toPrecision(count)).toLocaleString("en", { maximumFractionDigits: 6 });

export const number = (value, count = 3) => (value === null || value === undefined ? "–" : digits(value, count));
export const percent = (value) => (value === null || value === undefined ? "–" : `${number(100 * value)} %`);
export const rate = (value) => (value === null || value === undefined ? "–" : `${number(value)} /s`);

export function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  return seconds < 1 ? `${number(1000 * seconds)} ms` : `${number(seconds)} s`;
}

export function ago(seconds) {
  if (seconds < 100) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

export const clock = (unix) => new Date(1000 * unix).toLocaleTimeString([], { hour12: false });
export const day = (unix) => new Date(1000 * unix).toLocaleString([], { dateStyle: "short", timeStyle: "medium", hour12: false });
