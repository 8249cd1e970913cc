// A training's events as what the panel shows. Nothing here touches the page.

import { t } from "./words.mjs";

export const MOST_POINTS = 1500;

export function emptyRun(name = "") {
  return { name, steps: 0, planned: 0, points: [], gates: {}, levels: [], samples: [], state: "new", error: "", memory: null };
}

// Takes one event in. Steps may come twice (from the file and live) or start again after a resume.
export function take(run, event) {
  const step = event.step ?? 0;
  if (event.event === "start") Object.assign(run, emptyRun(run.name), { planned: event.steps ?? 0, state: "running" });
  if (event.event === "resume") {
    run.points = run.points.filter((point) => point.step <= step);
    Object.assign(run, { steps: step, planned: event.steps ?? run.planned, state: "running", error: "" });
  }
  if (event.event === "step") {
    const last = run.points.at(-1)?.step ?? 0;
    if (step > last) run.points.push(pointOf(event));
    if (run.points.length > 2 * MOST_POINTS) run.points = thinned(run.points);
    Object.assign(run, { steps: Math.max(step, run.steps), planned: event.steps ?? run.planned, state: "running" });
    if (event.best_step != null) run.best = event.best_step;
    if (event.open_by_layer) run.gates = event.open_by_layer;
    if (event.open_by_level) run.levels = event.open_by_level.map((share, i) => share ?? run.levels[i] ?? null);
  }
  if (event.event === "sample") {
    const known = new Set(run.samples.map((sample) => sample.file));
    for (const file of event.files ?? []) if (!known.has(file)) run.samples.push({ step, file });
  }
  if (event.event === "stopped" || event.event === "finished") run.state = event.event;
  if (event.event === "error") Object.assign(run, { state: "failed", error: event.text ?? "" });
  if (event.memory != null) run.memory = event.memory;
  return run;
}

function pointOf(event) {
  return {
    step: event.step,
    loss: event.loss ?? null,
    smoothed: event.smoothed_loss ?? null,
    heldOut: event.held_out_loss ?? null,
    rate: event.learning_rate ?? null,
    open: event.open_share ?? null,
    left: event.seconds_left ?? null,
    pace: event.steps_per_second ?? null,
  };
}

// Every other point, the first, the last and those with a held-out loss always.
export function thinned(points) {
  return points.filter((point, i) => i % 2 === 0 || i === points.length - 1 || point.heldOut != null);
}

export function columns(points) {
  return ["step", "loss", "smoothed", "heldOut", "rate"].map((name) => points.map((point) => point[name]));
}

export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return t("{s} s", { s: whole });
  if (whole < 3600) return t("{min} min {s} s", { min: Math.floor(whole / 60), s: whole % 60 });
  return t("{h} h {min} min", { h: Math.floor(whole / 3600), min: Math.floor((whole % 3600) / 60) });
}

export function short(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 10000) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

export function numbers(run) {
  const last = run.points.at(-1) ?? {};
  const shown = [
    [t("step"), t("{step} of {planned}", { step: run.steps, planned: run.planned || "?" })],
    [t("loss"), short(last.loss), "loss"],
    [t("smoothed"), short(last.smoothed), "smoothed"],
  ];
  const held = run.points.findLast?.((point) => point.heldOut != null)?.heldOut;
  if (held != null) shown.push([t("held out"), short(held), "heldOut"]);
  if (run.best != null) shown.push([t("best at step"), String(run.best)]);
  shown.push([t("learning rate"), short(last.rate), "rate"]);
  if (run.state === "running") shown.push([t("left"), duration(last.left)]);
  shown.push([t("steps/s"), short(last.pace)]);
  if (last.open != null) shown.push([t("gates open"), `${Math.round(100 * last.open)} %`]);
  if (run.memory != null) shown.push([t("memory"), `${(run.memory / 2 ** 30).toFixed(1)} GiB`]);
  return shown;
}

// Where among ten parts of the noise level, and in how many layers, the gates are open: cells with their words.
export function gateCells(run) {
  const percent = (share) => t("{percent} % of the gates are open", { percent: Math.round(100 * share) });
  const layers = Object.entries(run.gates).slice(0, 400);
  return {
    layers: layers.map(([layer, share]) => ({ share, title: `${layer}: ${percent(share)}` })),
    levels: run.levels.map((share, i) => ({
      share,
      title: `${t("noise {from} to {to} %", { from: 100 - 10 * i, to: 90 - 10 * i })}: ${share == null ? t("not seen yet") : percent(share)}`,
    })),
  };
}

export function sentence(run) {
  const at = { step: run.steps, planned: run.planned };
  if (run.state === "running") return t("training");
  if (run.state === "stopped") return t("stopped at step {step} of {planned}; a checkpoint is kept: Resume goes on from there", at);
  if (run.state === "failed") return run.error || t("failed at step {step} of {planned}", at);
  if (run.state === "finished") return t("finished: {step} steps", at);
  return t("The training appears here.");
}
