// The history as charts: points of the server's control cycles, merged as they come, one chart for each question.

import { byId, clock, drawn, element, holding, number, percent, rate, span, write } from "./text.js";

const KEPT_S = 900;
const SMOOTH_S = 15;
const AUDIT_S = 120;
const MOST_LINES = 8;
const HEIGHT = 180;

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const some = (value) => value !== null && value !== undefined;

// ---- history ----------------------------------------------------------------------------------------------------

export class History {
  #points = new Map(); // replica -> {model, rows: Map(at -> point)}
  newest = 0;

  take(replicas) {
    for (const [name, columns] of Object.entries(replicas)) {
      const { model, ...fields } = columns;
      const series = this.#points.get(name) ?? { model, rows: new Map() };
      this.#points.set(name, series);
      fields.at_unix_s.forEach((at, index) => {
        const point = Object.fromEntries(Object.entries(fields).map(([field, values]) => [field, values[index]]));
        series.rows.set(at, point);
        this.newest = Math.max(this.newest, at);
      });
    }
    for (const [name, series] of this.#points) {
      for (const at of series.rows.keys()) if (at < this.newest - KEPT_S) series.rows.delete(at);
      if (!series.rows.size) this.#points.delete(name);
    }
  }

  // The times, with a gap where the controller was away, and the replicas with a point or null for each time.
  of(model, period) {
    const series = [...this.#points].filter(([, one]) => one.model === model).sort(([a], [b]) => (a < b ? -1 : 1));
    const times = [...new Set(series.flatMap(([, one]) => [...one.rows.keys()]))].sort((a, b) => a - b);
    const xs = [];
    for (const at of times) {
      if (xs.length && at - xs.at(-1) > 3 * period + 2) xs.push((xs.at(-1) + at) / 2);
      xs.push(at);
    }
    return { xs, replicas: series.map(([name, one]) => ({ name, rows: xs.map((at) => one.rows.get(at) ?? null) })) };
  }
}

// Sums of counts over the points that end in the last `window` seconds before each time, per second of these points.
function rates(data, field, window) {
  return data.xs.map((at, index) => {
    let total = null;
    for (const { rows } of data.replicas) {
      let count = 0, seconds = 0;
      for (let i = index; i >= 0 && data.xs[i] > at - window; i -= 1) {
        if (rows[i]) { count += rows[i][field]; seconds += rows[i].seconds; }
      }
      if (seconds && rows[index]) total = (total ?? 0) + count / seconds;
    }
    return total;
  });
}

function shares(data, part, whole) {
  return data.xs.map((at, index) => {
    let parts = 0, all = 0, there = false;
    for (const { rows } of data.replicas) {
      there ||= Boolean(rows[index]);
      for (let i = index; i >= 0 && data.xs[i] > at - AUDIT_S; i -= 1) {
        if (rows[i]) { parts += part(rows[i]); all += whole(rows[i]); }
      }
    }
    return there && all > 0 ? Math.min(1, Math.max(0, parts / all)) : null;
  });
}

const each = (data, field, combine) => data.xs.map((_, index) => {
  const rows = data.replicas.map(({ rows: all }) => all[index]).filter((row) => row && some(row[field]));
  return rows.length ? combine(rows) : null;
});
const weighted = (field, weight) => (rows) => {
  const total = rows.reduce((sum, row) => sum + row[weight], 0);
  return total ? rows.reduce((sum, row) => sum + row[field] * row[weight], 0) / total : null;
};
const plain = (field) => (rows) => rows.reduce((sum, row) => sum + row[field], 0) / rows.length;
const largest = (field) => (rows) => Math.max(...rows.map((row) => row[field]));
const column = (replica, value) => replica.rows.map((row) => (row ? value(row) ?? null : null));

// The replicas with the most running requests, when there are too many for one chart.
function shown(data) {
  if (data.replicas.length <= MOST_LINES) return data.replicas;
  const load = ({ rows }) => rows.slice(-6).reduce((sum, row) => sum + (row ? row.running : 0), 0);
  return [...data.replicas].sort((a, b) => load(b) - load(a)).slice(0, MOST_LINES);
}

const line = (label, values, colour, more = {}) => ({ label, values, colour, ...more });
const target = (label, values) => line(label, values, "target", { dash: [6, 5], width: 2 });
const known = (values) => values.some(some);

// The top of a chart. Of times, a single one far beyond all others, such as an engine's first iteration, runs out of it.
function top(lines, least, clips) {
  const values = lines.filter((one) => one.colour !== "target").flatMap((one) => one.values.filter(some)).sort((a, b) => a - b);
  const usual = values[Math.floor(0.97 * (values.length - 1))] ?? 0, most = values.at(-1) ?? 0;
  const targets = lines.filter((one) => one.colour === "target").map((one) => one.values.findLast(some) ?? 0);
  return 1.08 * Math.max(clips && most > 3 * usual && usual > 0 ? 1.3 * usual : most, ...targets) || least;
}

const CHARTS = [
  {
    id: "requests", title: "Requests", format: rate,
    note: "Offered, admitted to the engines, and completed within every target. A gap between offered and admitted is rejected or waits.",
    lines: (data) => [
      line("offered", rates(data, "arrivals", SMOOTH_S), 1), line("admitted", rates(data, "admitted", SMOOTH_S), 0),
      line("good", rates(data, "good", SMOOTH_S), 2, { fill: true }),
    ],
  },
  {
    id: "ttft", title: "Time to first token (TTFT)", format: span,
    note: "Of requests that finished: the median, and the time within which 95 % of them had it, on the worst replica.",
    lines: (data) => [
      line("median", each(data, "ttft_s", weighted("ttft_s", "completed")), 0, { dots: true }),
      line("95 % within", each(data, "ttft_slow_s", largest("ttft_slow_s")), 1, { dots: true }),
      target("target", each(data, "ttft_target_s", largest("ttft_target_s"))),
    ],
  },
  {
    id: "tpot", title: "Time per further token (TPOT)", format: span,
    note: "The same for each further output token. The scheduler keeps batches so small that this stays below the target.",
    lines: (data) => [
      line("median", each(data, "tpot_s", weighted("tpot_s", "completed")), 0, { dots: true }),
      line("95 % within", each(data, "tpot_slow_s", largest("tpot_slow_s")), 1, { dots: true }),
      target("target", each(data, "tpot_target_s", largest("tpot_target_s"))),
    ],
  },
  {
    id: "kv", title: "KV cache used", format: percent, top: 1,
    note: "Share of each replica’s KV cache in use. M*: where the fluid model’s equilibrium is at the present load; C: all of it.",
    lines: (data) => [
      ...shown(data).map((one, index) => line(one.name, column(one, (row) => row.kv_used_tokens / row.kv_capacity_tokens), index)),
      line("M* (mean)", each(data, "kv_planned_tokens", (rows) => rows.reduce((sum, row) => sum + row.kv_planned_tokens / row.kv_capacity_tokens, 0) / rows.length), "quiet", { dash: [3, 4], width: 2 }),
      target("capacity C", data.xs.map(() => 1)),
    ],
  },
  {
    id: "running", title: "Running requests and their thresholds", format: (value) => number(value),
    note: "Lines: running requests. Dashed: how many may run by the thresholds in force. They follow the measured load and lengths.",
    lines: (data) => shown(data).flatMap((one, index) => [
      line(one.name, column(one, (row) => row.running), index),
      line(`${one.name}: most`, column(one, (row) => row.slots), index, { dash: [6, 5], step: true }),
    ]),
  },
  {
    id: "waiting", title: "Waiting requests", format: (value) => number(value),
    note: "Waiting for admission. Dashed: the longest queue from which requests are still in time; beyond it they are rejected.",
    lines: (data) => shown(data).flatMap((one, index) => [
      line(one.name, column(one, (row) => row.waiting), index),
      line(`${one.name}: most`, column(one, (row) => row.queue_limit), index, { dash: [6, 5], step: true, optional: true }),
    ]),
  },
  {
    id: "iteration", title: "Iteration time: predicted and measured", format: span,
    note: "Mean over the iterations of a control cycle. While the two agree, the model fits, and what follows from it can be trusted.",
    lines: (data) => [
      line("measured", each(data, "iteration_s", plain("iteration_s")), 0),
      line("predicted", each(data, "predicted_s", plain("predicted_s")), 1, { dash: [6, 5], width: 2 }),
    ],
  },
  {
    id: "rejected", title: "Rejected requests", format: rate,
    note: "Answered with HTTP 429 before any token was spent on them. At the door: while the queues of all replicas were full.",
    lines: (data) => [
      line("all", rates(data, "rejected", SMOOTH_S), 1, { fill: true }),
      ...[["at the door", "front_door", 0], ["queue full", "queue_full", 3], ["too late for TTFT", "too_late", 4]]
        .map(([label, field, colour]) => line(label, rates(data, `rejected_${field}`, SMOOTH_S), colour, { width: 1.25 }))
        .filter((one) => one.values.some((value) => value > 0)),
    ],
  },
  {
    id: "audit", title: "Were the decisions right?", format: percent, top: 1,
    note: "Over two minutes. Rejected in vain: of the few served although they would be rejected, those in time. Admitted in vain: admitted, and late.",
    lines: (data) => [
      line("rejected in vain", shares(data, (row) => row.audited_met, (row) => row.audited), 1, { dots: true }),
      line("admitted in vain", shares(data, (row) => row.completed - row.audited - (row.good - row.audited_met), (row) => row.completed - row.audited), 3, { dots: true }),
    ],
  },
];

// ---- one chart --------------------------------------------------------------------------------------------------

class Chart {
  #plot = null;
  #labels = "";
  #lines = [];
  #xs = [];
  #cells = [];

  constructor(definition, parent) {
    this.definition = definition;
    this.box = element("div", { class: "plot", "aria-hidden": "true" });
    this.legend = element("table", { class: "legend" });
    this.empty = element("p", { class: "empty" }, "Nothing yet.");
    const caption = holding("figcaption", {}, element("h3", {}, definition.title), element("p", {}, definition.note));
    const figure = holding("figure", { id: `chart-${definition.id}` }, caption, this.empty, this.box, this.legend);
    parent.append(figure);
    new ResizeObserver(() => this.#resize()).observe(this.box);
  }

  show(data) {
    this.#lines = this.definition.lines(data).filter((one) => known(one.values) || !(one.optional || one.colour === "target"));
    this.#xs = data.xs;
    const hasData = this.#lines.some((one) => one.colour !== "target" && known(one.values));
    this.empty.hidden = hasData;
    this.box.hidden = !hasData;
    this.legend.hidden = !hasData;
    if (!hasData) return;
    const labels = JSON.stringify(this.#lines.map((one) => [one.label, one.colour]));
    if (labels !== this.#labels) {
      this.#labels = labels;
      this.restyle();
    } else this.#plot.setData([this.#xs, ...this.#lines.map((one) => one.values)]);
    this.#read(null);
  }

  // Drawn anew: other lines, or other colours.
  restyle() {
    if (!this.#lines.length) return;
    this.#plot?.destroy();
    this.#tabulate();
    const colour = (one) => style(one.colour === "target" ? "--target" : one.colour === "quiet" ? "--quiet" : `--c${one.colour}`);
    const axis = { stroke: style("--quiet"), grid: { stroke: style("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    this.#plot = new uPlot({
      width: Math.max(120, this.box.clientWidth), height: HEIGHT, legend: { show: false },
      cursor: { sync: { key: "headrace" }, y: false, points: { size: 6 }, drag: { x: false, y: false } },
      scales: { x: { time: true }, y: { range: () => [0, top(this.#lines, this.definition.top ?? 1, this.definition.format === span)] } },
      axes: [
        { ...axis, space: 70, size: 30, values: (_, ticks) => ticks.map((at) => clock(at).slice(0, 5)) },
        { ...axis, size: 58, values: (_, ticks) => ticks.map((value) => this.definition.format(value)) },
      ],
      series: [{}, ...this.#lines.map((one) => ({
        label: one.label, stroke: colour(one), width: one.width ?? 1.75, dash: one.dash, spanGaps: one.dots ?? false,
        fill: one.fill ? `${colour(one)}26` : undefined, points: { show: false },
        paths: one.step ? uPlot.paths.stepped({ align: 1 }) : undefined,
      }))],
      hooks: { setCursor: [(plot) => this.#read(plot.cursor.idx ?? null)] },
    }, [this.#xs, ...this.#lines.map((one) => one.values)], this.box);
  }

  #tabulate() {
    this.legend.replaceChildren(element("caption", { class: "skip" }, `${this.definition.title}: values now`));
    this.#cells = this.#lines.map((one) => {
      const css = one.colour === "target" ? "st" : one.colour === "quiet" ? "sq" : `s${one.colour}`;
      const mark = drawn("svg", { viewBox: "0 0 24 8", "aria-hidden": "true" }, drawn("line", {
        x1: 0, x2: 24, y1: 4, y2: 4, class: css, ...(one.dash ? { "stroke-dasharray": "6 4" } : {}),
      }));
      const head = holding("th", { scope: "row" }, mark, document.createTextNode(one.label));
      const cell = element("td");
      this.legend.append(holding("tr", {}, head, cell));
      return cell;
    });
  }

  // The values under the cursor; without one, the latest.
  #read(index) {
    this.#lines.forEach((one, place) => {
      const at = index ?? one.values.findLastIndex(some);
      if (this.#cells[place]) write(this.#cells[place], this.definition.format(one.values[at]));
    });
  }

  #resize() {
    if (this.#plot && this.box.clientWidth) this.#plot.setSize({ width: this.box.clientWidth, height: HEIGHT });
  }
}

export class Charts {
  constructor(parent) {
    this.all = CHARTS.map((definition) => new Chart(definition, parent));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.all.forEach((one) => one.restyle()));
  }

  show(history, model, period) {
    const data = history.of(model, period);
    for (const one of this.all) one.show(data);
    const count = data.replicas.length;
    write(byId("charts-note"), `Times are this browser’s. ${count > MOST_LINES ? `Of ${count} replicas the ${MOST_LINES} with the most running requests have lines. ` : ""}A point for each control cycle (${number(period)} s); rates over ${SMOOTH_S} s. Point at a chart to read its values.`);
  }
}
