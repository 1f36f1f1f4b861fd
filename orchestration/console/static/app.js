// The console's own script: charts, the stream of changes, and relative times. Everything else is HTML, or htmx.
"use strict";

const LINES = ["--series-1", "--series-2", "--series-3", "--series-4", "--series-5"];
const charts = new WeakMap(); // element -> uPlot

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function data(curve) {
  return [curve.times, ...curve.series.map((line) => line.values)];
}

// The hour, with the day below where one begins; days alone where the steps are that long.
function timeLabels(plot, times, _axis, _space, step) {
  return times.map((seconds) => {
    const text = new Date(seconds * 1000).toISOString();
    if (step >= 86400) return text.slice(0, 10);
    return text.slice(11, 16) === "00:00" ? `00:00\n${text.slice(0, 10)}` : text.slice(11, 16);
  });
}

function drawChart(element) {
  const curve = JSON.parse(element.dataset.chart);
  const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
  const options = {
    width: element.clientWidth,
    height: Number(element.dataset.height),
    tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
    axes: [{ ...axis, values: timeLabels }, { ...axis, size: 60 }],
    cursor: { drag: { x: true, y: false } },
    series: [
      { label: "UTC", value: "{YYYY}-{MM}-{DD} {HH}:{mm}" },
      ...curve.series.map((line, index) => ({
        label: line.label,
        stroke: colour(LINES[index % LINES.length]),
        width: 1.5,
        dash: index >= LINES.length ? [6, 4] : [],
        value: (_, value) => (value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: 4 })),
      })),
    ],
  };
  charts.set(element, new uPlot(options, data(curve), element));
}

function drawCharts(root) {
  for (const element of root.querySelectorAll(".chart")) if (!charts.has(element)) drawChart(element);
}

window.addEventListener("resize", () => {
  for (const element of document.querySelectorAll(".chart")) charts.get(element)?.setSize({ width: element.clientWidth, height: Number(element.dataset.height) });
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const element of document.querySelectorAll(".chart")) {
    charts.get(element)?.destroy();
    charts.delete(element);
  }
  drawCharts(document);
});

// A chart that is refreshed keeps its canvas, and so what a person points at; only its data change.
document.addEventListener("htmx:oobBeforeSwap", (event) => {
  const shown = [...event.detail.target.querySelectorAll(".chart")];
  const fresh = shown.map((element) => event.detail.fragment.querySelector(`[id="${element.id}"]`));
  if (!shown.length || shown.some((element, index) => fresh[index]?.ariaLabel !== element.ariaLabel)) return;
  shown.forEach((element, index) => {
    element.dataset.chart = fresh[index].dataset.chart;
    charts.get(element)?.setData(data(JSON.parse(element.dataset.chart)));
  });
  event.detail.shouldSwap = false;
});
document.addEventListener("htmx:oobAfterSwap", (event) => drawCharts(event.detail.target.parentElement ?? document));
document.addEventListener("htmx:afterSwap", (event) => drawCharts(event.detail.elt.parentElement ?? document));

// A level of Why? that a person opened before htmx listened to it.
document.addEventListener("htmx:load", (event) => {
  const loaded = event.detail.elt;
  for (const level of [loaded, ...loaded.querySelectorAll("details")]) {
    if (level.matches("details[open][hx-get]") && level.querySelector(":scope > .parts > .loading")) htmx.trigger(level, "toggle");
  }
});

// --- live

function ago(milliseconds) {
  const seconds = Math.max(0, Math.round(milliseconds / 1000));
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} days`;
}

let state = null;
let connected = false;
const utc = (text) => new Date(`${text.replace(" ", "T")}Z`).getTime();

function showStatus() {
  const text = document.getElementById("status-text");
  const status = document.getElementById("status");
  let said = "not connected: these figures do not move";
  if (connected && state) {
    if (state.problem) said = state.problem;
    else if (!state.ingested_at) said = "reading the newest figures";
    else said = `live, ${ago(Date.now() - Math.min(utc(state.received_at ?? state.ingested_at), utc(state.ingested_at)))} behind${state.build ? ` · build ${state.build}` : " · no marts yet"}`;
  }
  if (text.textContent !== said) text.textContent = said;
  status.classList.toggle("on", connected && !!state && !state.problem);
}

function listen() {
  const events = new EventSource("/live");
  events.addEventListener("live", (event) => {
    connected = true;
    state = JSON.parse(event.data);
    showStatus();
    const version = `${state.ledger} ${state.build}`; // the page may be older than the first event
    if (version !== document.body.dataset.version) document.body.dispatchEvent(new Event("live"));
    document.body.dataset.version = version;
  });
  events.onerror = () => {
    connected = false;
    showStatus();
  };
  window.addEventListener("pagehide", () => events.close());
}

document.addEventListener("DOMContentLoaded", () => {
  drawCharts(document);
  listen();
  setInterval(showStatus, 1000);
});
