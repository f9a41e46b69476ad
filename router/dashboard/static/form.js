// Changes by an operator: the fluid model's prediction first, then, for exactly the predicted values, the change.

import { ask } from "./api.js";
import { byId, element, holding, number, percent, rate, span, write } from "./text.js";

const ROWS = [
  ["good requests", "goodput_rps", rate], ["capacity", "capacity_rps", rate], ["limit", "limit", (value) => value || "–"],
  ["can meet every target", "in_time", percent], ["running at capacity, each", "running", number],
  ["longest queue, each", "queue_limit", (value) => value ?? "any"], ["iteration at this load", "iteration_s", span],
];

const decimal = (text, scale = 1) => {
  const trimmed = text.trim().replace(",", ".");
  if (trimmed === "") return null;
  const value = Number(trimmed);
  if (!Number.isFinite(value)) throw new Error(`${text} is not a number`);
  return Number((value * scale).toPrecision(12));
};

class ChangeForm {
  #predicted = null;
  #busy = false;

  constructor(id, read, apply, after) {
    this.form = byId(id);
    this.place = this.form.querySelector(".prediction");
    this.button = this.form.querySelector(".apply");
    Object.assign(this, { read, apply, after, touched: false });
    this.form.addEventListener("input", () => { this.touched = true; this.#outdated(); });
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit(event.submitter?.value ?? "predict");
    });
  }

  fields() { return this.form.elements; }

  fill(values) {
    if (this.touched || this.form.contains(document.activeElement)) return;
    for (const [name, value] of Object.entries(values)) {
      if (this.fields()[name].value !== String(value)) this.fields()[name].value = value;
    }
  }

  #outdated() {
    this.#predicted = null;
    this.button.disabled = true;
    this.place.replaceChildren();
  }

  async #submit(what) {
    if (this.#busy) return;
    this.#busy = true;
    try {
      const wanted = this.read(this.fields());
      if (what === "apply" && this.#predicted === JSON.stringify(wanted.question)) await this.#apply(wanted);
      else await this.#predict(wanted);
    } catch (error) {
      this.button.disabled = true;
      this.place.replaceChildren(element("p", { class: "error" }, error.message));
    } finally {
      this.#busy = false;
    }
  }

  async #predict(wanted) {
    let answer;
    try {
      answer = await ask("predict", wanted.question);
    } catch (error) {
      if (error.status !== 409 && error.status !== 503) throw error;
      // Nothing can be said of it; the operator may still know better.
      this.place.replaceChildren(element("p", {}, `No prediction: ${error.message}. It can be applied all the same.`));
    }
    if (answer) this.place.replaceChildren(element("p", {}, answer.sentence), ...[wanted.note].filter(Boolean).map((note) => element("p", { class: "quiet" }, note)), table(answer));
    this.#predicted = JSON.stringify(wanted.question);
    this.button.disabled = false;
  }

  async #apply(wanted) {
    this.button.disabled = true;
    const said = await this.apply(wanted);
    this.#predicted = null;
    this.touched = false;
    this.place.replaceChildren(element("p", { class: "done" }, said));
    this.after();
  }
}

function table({ now, then }) {
  const head = holding("tr", {}, element("th", { scope: "col" }, "prediction"), element("th", { scope: "col" }, "now"), element("th", { scope: "col" }, "then"));
  const rows = ROWS.map(([label, field, format]) => holding("tr", {}, element("th", { scope: "row" }, label), element("td", {}, format(now[field])), element("td", {}, format(then[field]))));
  return holding("table", {}, head, ...rows);
}

export function makeForms(modelOf, after) {
  const author = (fields) => ({ by: fields.by.value.trim(), reason: fields.reason.value.trim() });

  const targets = new ChangeForm("targets-form", (fields) => {
    const wanted = { ttft_s: decimal(fields.ttft_s.value), tpot_s: decimal(fields.tpot_ms.value, 0.001), latency_s: decimal(fields.latency_s.value) };
    const change = { settings: { targets: wanted }, model: modelOf() };
    return { question: change, change: { ...change, ...author(fields) } };
  }, async ({ change }) => {
    const answer = await ask("settings", change, "PUT");
    const left = Object.values(answer.replicas).filter((one) => !one.accepted);
    return left.length ? `Kept; not yet taken by ${left.length} replicas: ${left[0].reason}` : "Applied. The thresholds for the new targets follow with the next control cycle.";
  }, after);

  const thresholds = new ChangeForm("thresholds-form", (fields) => {
    const action = fields.action.value, replica = fields.replica.value || null;
    const values = { max_running: decimal(fields.max_running.value), token_budget: decimal(fields.token_budget.value) };
    const body = action === "set" ? { thresholds: values, pin: true } : action === "pin" ? { pin: true } : { auto: true };
    const question = { model: modelOf(), ...(action === "set" ? { thresholds: values } : action === "auto" ? { auto: true } : {}) };
    return {
      question, change: { replica, ...body, ...author(fields) },
      note: replica && action !== "pin" ? "As if every replica had these values." : null,
    };
  }, async ({ change }) => {
    const answer = await ask("thresholds", change, "PUT");
    const versions = Object.entries(answer.replicas).map(([name, one]) => `${name} version ${one.version}`).join(", ");
    const kept = answer.pin.kept ? "" : ` But ${answer.pin.reason}.`;
    return `In force: ${versions}.${kept}`;
  }, after);

  const showValues = () => {
    const set = thresholds.fields().action.value === "set";
    for (const label of byId("thresholds-form").querySelectorAll(".value")) label.hidden = !set;
  };
  thresholds.fields().action.addEventListener("change", showValues);
  showValues();

  return (model, rows) => {
    const now = model.targets ?? {};
    targets.fill({ ttft_s: now.ttft_s ?? "", tpot_ms: now.tpot_s ? Number((1000 * now.tpot_s).toPrecision(6)) : "", latency_s: now.latency_s ?? "" });
    const select = thresholds.fields().replica, chosen = select.value;
    const names = rows.map(([name]) => name);
    if ([...select.options].slice(1).map((one) => one.value).join() !== names.join()) {
      select.replaceChildren(select.options[0], ...names.map((name) => element("option", { value: name }, name)));
      select.value = names.includes(chosen) ? chosen : "";
    }
    const [, first] = rows.find(([name, row]) => row.reachable && (!select.value || name === select.value)) ?? [];
    if (first) {
      thresholds.fill({ max_running: first.max_running ?? "", token_budget: first.token_budget ?? "" });
      thresholds.fields().max_running.placeholder = `${first.max_num_seqs} (engine)`;
      thresholds.fields().token_budget.placeholder = `${first.max_num_batched_tokens} (engine)`;
    }
  };
}
