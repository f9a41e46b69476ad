// The page: asks the server every few seconds and writes what it says. It says so when there is no answer.

import { ask, key } from "./api.js";
import { Charts, History } from "./charts.js";
import { makeForms } from "./form.js";
import { ago, byId, day, clock, drawn, element, holding, number, percent, write } from "./text.js";

const EVERY_MS = 2000;
const SHOWN_CHANGES = 8;
const history = new History();
const charts = new Charts(byId("charts"));
let latest = null;
let answeredAt = null;
let timer = null;
let period = 5;

const model = () => byId("model").value;
const showForms = makeForms(model, () => round());

async function round() {
  clearTimeout(timer);
  try {
    const [overview, points] = await Promise.all([ask("overview"), ask(`history?after=${history.newest}`)]);
    answered(overview, points);
  } catch (error) {
    if (error.status === 401) return askForKey();
    lost(error);
  }
  if (!document.hidden) timer = setTimeout(round, EVERY_MS);
}

function answered(overview, points) {
  latest = overview;
  answeredAt = Date.now();
  period = overview.controller.period_s ?? period;
  history.take(points.replicas);
  document.body.classList.remove("stale");
  byId("connection").removeAttribute("data-lost");
  write(byId("connection"), `live, ${clock(overview.at_unix_s)}`);
  byId("forget").hidden = !key.get();
  show();
}

function lost(error) {
  document.body.classList.add("stale");
  byId("connection").setAttribute("data-lost", "");
  const since = answeredAt ? ` since ${clock(answeredAt / 1000)}` : "";
  const said = error.status ? `The server answers with an error (${error.message})` : `The server has not answered${since}`;
  write(byId("connection"), "no connection");
  health({ level: "bad", title: "No answer", sentences: [`${said}. This page keeps asking${latest ? "; below is what was known last" : ""}.`] });
}

function show() {
  chooseModels(Object.keys(latest.models));
  const one = latest.models[model()];
  write(byId("application"), latest.application === "headrace" ? "" : latest.application);
  document.title = `${latest.health.title} · ${latest.application}`;
  health(latest.health);
  if (!one) return;
  card("load", one.load, meter(one.load.share));
  card("limit", one.limit);
  const change = latest.changes[0];
  card("change", change
    ? { headline: `${change.headline}, ${ago(change.age_s)}`, sentence: change.sentence }
    : { headline: latest.controller.alive ? "nothing yet" : "not known", sentence: latest.controller.alive ? "Nothing has changed since the start." : `Not known: ${latest.controller.reason}.` });
  card("one-more", one.one_more);
  card("wanted", one.wanted);
  const rows = Object.entries(latest.replicas).filter(([, row]) => row.model === model());
  replicas(rows);
  if (latest.controller.alive || !byId("events").children.length) changes(latest.changes);
  showForms(one, rows);
  charts.show(history, model(), period);
}

function chooseModels(names) {
  const select = byId("model"), chosen = select.value;
  if ([...select.options].map((one) => one.value).join("\n") === names.join("\n")) return;
  select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  if (names.includes(chosen)) select.value = chosen;
  byId("model-choice").hidden = names.length < 2;
}

function health({ level, title, sentences }) {
  byId("health").dataset.level = level;
  write(byId("health-title"), title);
  const list = byId("health-sentences");
  if ([...list.children].map((item) => item.textContent).join("\n") === sentences.join("\n")) return;
  list.replaceChildren(...sentences.map((one) => element("li", {}, one)));
}

function card(id, { headline, sentence, level }, extra = null) {
  const box = byId(id);
  box.dataset.level = level ?? "note";
  write(box.querySelector(".headline"), headline);
  write(box.querySelector(".sentence"), sentence);
  box.querySelector(".meter")?.remove();
  if (extra) box.querySelector(".headline").after(extra);
}

function meter(share) {
  if (share === null || share === undefined) return null;
  const end = Math.max(1.25, share), x = (value) => (100 * value) / end;
  return drawn("svg", { class: "meter", viewBox: "0 0 100 14", preserveAspectRatio: "none", "aria-hidden": "true" },
    drawn("rect", { class: "track", x: 0, y: 3, width: 100, height: 8, rx: 1 }),
    drawn("rect", { class: "used", x: 0, y: 3, width: x(share), height: 8, rx: 1 }),
    drawn("line", { class: "mark-line", x1: x(1), x2: x(1), y1: 0, y2: 14, "vector-effect": "non-scaling-stroke" }));
}

function replicas(rows) {
  const body = byId("replicas").tBodies[0];
  const made = rows.map(([name, row]) => {
    const odd = row.oddities.map(({ name: what, level, text }) => holding("span", { class: "odd" }, element("span", { class: "tag", "data-level": level }, what), document.createTextNode(text)));
    const cells = row.reachable ? [
      running(row), number(row.waiting), percent(row.kv_used_fraction), number(row.rate_rps), number(row.capacity_rps),
      number(row.rejected, 12), number(row.preemptions, 12),
    ] : ["–", "–", "–", "–", "–", "–", "–"];
    return holding("tr", {}, element("th", { scope: "row" }, name),
      holding("td", {}, ...(odd.length ? odd : [document.createTextNode("–")])),
      ...cells.map((text) => element("td", { class: "n" }, text)),
      element("td", {}, row.reachable ? `${row.pinned ? "pinned" : "automatic"}, version ${row.version}` : "–"),
      element("td", { class: "decision" }, row.reachable ? row.decision : row.reason));
  });
  if (body.textContent !== made.map((one) => one.textContent).join("")) body.replaceChildren(...made);
}

const running = (row) => (row.max_running === null ? number(row.running) : `${row.running} of ${row.max_running}`);

function changes(all) {
  const list = byId("events");
  const made = all.slice(0, SHOWN_CHANGES).map((one) => holding("li", {}, element("time", { datetime: new Date(1000 * one.at_unix_s).toISOString() }, day(one.at_unix_s)),
    element("span", { class: "kind" }, one.headline), element("span", { class: "said" }, one.sentence)));
  if (!made.length) made.push(element("li", {}, latest.controller.alive ? "No change yet." : "Not known."));
  if (list.textContent !== made.map((one) => one.textContent).join("")) list.replaceChildren(...made);
}

function askForKey() {
  const dialog = byId("key-dialog");
  write(byId("key-error"), key.get() ? "The server does not take this key." : "");
  key.forget();
  byId("key").value = "";
  if (!dialog.open) dialog.showModal();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  byId("key").value = "";
  byId("key-dialog").close();
  round();
});
byId("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
byId("forget").addEventListener("click", () => { key.forget(); location.reload(); });
byId("model").addEventListener("change", show);
document.addEventListener("visibilitychange", () => { if (!document.hidden) round(); });
round();
