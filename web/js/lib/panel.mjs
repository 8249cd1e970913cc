// The training on its node: curves, numbers, samples and buttons, from the run's events.

import uPlot from "../vendor/uplot.mjs";
import { addPageWidget, colour, element, isFree, makeRoom, widgetNamed } from "./page.mjs";
import { columns, emptyRun, gateCells, numbers, sentence, take } from "./training.mjs";
import { t } from "./words.mjs";

export const TRAINERS = new Set(["SpectralAdapters_TrainAdapter", "SpectralAdapters_DistilAdapters", "SpectralAdapters_ConceptSlider"]);
const PROPERTY = "spectral_run";
const REST = 26; // before there is a run: a sentence
const LEAST = 84; // with one: buttons, and the rest by scrolling
const WHOLE = 330; // with curves, gates and samples
const COLOURS = { loss: "#8fb7ff", smoothed: "#4c8dff", heldOut: "#e5534b", rate: "#d29922" };

export class Panel {
  constructor(node, host) {
    this.node = node;
    this.host = host; // fetch, queue, interrupt and useAdapter of the page
    this.run = emptyRun();
    this.grownTo = 0;
    this.box = element("div", { class: "spectral spectral-training", role: "group", "aria-label": t("training") });
    this.said = element("div", { role: "status" });
    this.figures = element("div", { class: "spectral-row spectral-numbers" });
    this.plot = element("div", { class: "spectral-plot", "aria-hidden": "true" });
    this.gates = element("div", { class: "spectral-gates", role: "img" });
    this.samples = element("div", { class: "spectral-samples" });
    this.buttons = {
      stop: this.button(t("Stop and keep"), () => this.stop(), t("Stops after this step. Nothing is lost.")),
      resume: this.button(t("Resume"), () => this.host.queue(this.node), t("Goes on where the run stopped.")),
      use: this.button(t("Use now"), () => this.useNow(), t("What is learned so far as an adapter, in a loader.")),
      more: this.button(t("More steps"), () => this.moreSteps(), t("Half as many again, in the same run.")),
    };
    const row = element("div", { class: "spectral-row spectral-buttons" }, ...Object.values(this.buttons));
    this.box.append(row, this.said, this.figures, this.plot, this.gates, this.samples);
    addPageWidget(node, "training_panel", this.box, () => (this.isAtRest ? REST : LEAST));
    new ResizeObserver(() => this.resize()).observe(this.plot);
    this.draw();
  }

  button(label, act, title) {
    return element("button", { type: "button", title, onclick: act }, label);
  }

  get name() {
    return this.node.properties[PROPERTY] || widgetNamed(this.node, "run_name")?.value || "";
  }

  isFor(detail) {
    const asked = widgetNamed(this.node, "run_name")?.value;
    return asked ? asked === detail.asked || this.name === detail.name : this.name === detail.name;
  }

  // Events as they come. The first of a run that is not known here asks for what went before.
  async live(detail) {
    if (this.name !== detail.name || this.run.name !== detail.name) {
      this.node.properties[PROPERTY] = detail.name;
      await this.restore();
    }
    const before = this.run.state;
    for (const event of detail.events) take(this.run, { ...event, memory: detail.memory });
    this.grow();
    if (this.run.state !== before) this.note = undefined; // what happened now matters more
    this.draw();
  }

  async restore() {
    const name = this.name;
    if (!name) return this.draw();
    const found = await this.host.fetchRun(name);
    if (name !== this.name) return undefined;
    this.run = emptyRun(name);
    if (found?.events.length) {
      for (const event of found.events) take(this.run, event);
      if (this.run.state === "running" && !found.running) this.run.state = "stopped";
    }
    return this.draw();
  }

  get isAtRest() {
    return this.run.state === "new" && (this.node.spectralReport?.dataset.kind ?? "hint") === "hint";
  }

  // The node grows for what there is now to show, once: for the curves only where that is over no other node.
  grow() {
    const { node } = this;
    const wanted = this.run.points.length ? WHOLE : LEAST;
    if (this.isAtRest || this.grownTo >= wanted) return;
    this.grownTo = wanted;
    const [x, y] = node.pos;
    const [width, height] = node.size;
    const now = this.box.clientHeight || height - node.computeSize()[1] + LEAST; // not in sight: no height of its own
    const more = isFree(node, [x, y + height, width, wanted - now]) ? wanted - now : LEAST - now;
    if (more > 0) node.setSize([width, height + more]);
  }

  draw() {
    const { run } = this;
    this.box.dataset.state = run.state;
    const isReported = run.state === "failed" && this.node.spectralReport?.dataset.kind === "error"; // in the same words
    this.said.textContent = isReported ? "" : this.note ?? sentence(run);
    this.said.className = run.state === "failed" ? "spectral-warn" : "spectral-muted";
    const shown = run.points.length ? numbers(run) : [];
    this.figures.replaceChildren(
      ...shown.map(([label, value, series]) =>
        element("span", series ? { style: `border-bottom:2px solid ${COLOURS[series]}` } : {}, `${label} `, element("b", {}, value)),
      ),
    );
    this.drawPlot();
    this.drawGates();
    this.drawSamples();
    const running = run.state === "running";
    this.buttons.stop.disabled = !running;
    this.buttons.resume.disabled = running || !["stopped", "failed"].includes(run.state);
    this.buttons.use.disabled = !run.points.length;
    this.buttons.more.disabled = running || !["stopped", "finished"].includes(run.state);
  }

  drawPlot() {
    if (!this.run.points.length) return;
    const data = columns(this.run.points);
    if (this.chart) this.chart.setData(data);
    else this.chart = new uPlot(this.plotOptions(), data, this.plot);
  }

  plotOptions() {
    const ink = colour("--input-text", "#ddd");
    const grid = { stroke: colour("--border-color", "#444"), width: 1 };
    const axis = { stroke: ink, grid, ticks: grid, font: "11px system-ui", size: 44 };
    const line = (name, width, scale = "loss") => ({
      label: name,
      stroke: COLOURS[name],
      width,
      scale,
      spanGaps: true,
      points: { show: false },
    });
    return {
      width: Math.max(200, this.plot.clientWidth || this.node.size[0] - 40),
      height: Math.max(120, this.plot.clientHeight),
      cursor: { show: false },
      legend: { show: false },
      scales: { x: { time: false }, loss: {}, rate: {} },
      axes: [
        { ...axis, size: 30, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000, 100000] },
        { ...axis, scale: "loss" },
        { ...axis, scale: "rate", side: 1, grid: { show: false }, size: 52, values: (_, marks) => marks.map(brief) },
      ],
      series: [
        {},
        line("loss", 0.5),
        line("smoothed", 2),
        { ...line("heldOut", 2), points: { show: true, size: 5 } },
        { ...line("rate", 1, "rate"), dash: [4, 4] },
      ],
    };
  }

  resize() {
    const [width, height] = [this.plot.clientWidth, Math.max(120, this.plot.clientHeight)];
    if (!this.chart || width < 50) return;
    if (Math.abs(width - this.chart.width) > 2 || Math.abs(height - this.chart.height) > 2) this.chart.setSize({ width, height });
  }

  drawGates() {
    const { layers, levels } = gateCells(this.run);
    const cell = ({ share, title }) => element("i", { title, style: `opacity:${(0.1 + 0.9 * (share ?? 0)).toFixed(2)}` });
    const strip = (label, cells) => [element("span", { class: "spectral-muted" }, label), element("div", {}, ...cells.map(cell))];
    this.gates.replaceChildren(
      ...(layers.length ? strip(t("open gates by layer"), layers) : []),
      ...(levels.length ? strip(t("by noise, high to low"), levels) : []),
    );
    this.gates.setAttribute("aria-label", [...layers, ...levels].slice(0, 20).map(({ title }) => title).join("; "));
  }

  drawSamples() {
    if (this.samples.childElementCount === this.run.samples.length) return;
    this.samples.replaceChildren(
      ...this.run.samples.slice(-40).map(({ step, file }) =>
        element(
          "figure",
          {},
          element("img", { src: this.host.sampleUrl(this.run.name, file), alt: t("sample of step {step}", { step }) }),
          element("figcaption", {}, t("step {step}", { step })),
        ),
      ),
    );
    requestAnimationFrame(() => (this.samples.scrollLeft = this.samples.scrollWidth));
  }

  async useNow() {
    this.say(t("saving what is learned so far …"));
    try {
      const file = await this.host.keep(this.run.name);
      await this.host.useAdapter(file, this.node);
      this.say(t("{file} is in a loader beside this node", { file }));
    } catch (error) {
      this.say(error.message);
    }
  }

  // The host can only stop whatever runs now; that is another one where this run ended and the page has not heard.
  async stop() {
    const found = await this.host.fetchRun(this.run.name);
    if (!found || found.running) return this.host.interrupt(); // not told: as asked
    await this.restore();
    return this.say(t("This run is over; nothing was stopped."));
  }

  moreSteps() {
    const widget = widgetNamed(this.node, "steps");
    widget.value = this.run.planned + Math.max(1, Math.round(this.run.planned / 2));
    widget.callback?.(widget.value);
    this.host.queue(this.node);
  }

  say(text) {
    this.note = text;
    this.draw();
    setTimeout(() => {
      this.note = undefined;
      this.draw();
    }, 8000);
  }
}

const brief = (value) => (value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(0) : String(value));

export function addPanel(node, host) {
  node.spectralPanel = new Panel(node, host);
  makeRoom(node);
}
