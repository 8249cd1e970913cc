// Run by node's own test runner: node --test tests/js

import assert from "node:assert/strict";
import { test } from "node:test";

import { facts, mismatchOf, size } from "../../web/js/lib/card.mjs";
import { asPoints, line, movedPoint, PRESETS, readPoints, SHAPES, widestGap, writePoints } from "../../web/js/lib/curve.mjs";
import { isFree, moveFree, nodeById } from "../../web/js/lib/page.mjs";
import { exceptionText, inputErrors, keep, readKept, reports } from "../../web/js/lib/report.mjs";
import { moved, readRows, shortName, writeRows } from "../../web/js/lib/stack.mjs";
import { methodBehind, unread } from "../../web/js/lib/shown.mjs";
import { columns, duration, emptyRun, gateCells, MOST_POINTS, numbers, sentence, short, take } from "../../web/js/lib/training.mjs";
import { filesBehind, sentence as verdictOf } from "../../web/js/lib/verdict.mjs";
import { SECTION, t, useWords } from "../../web/js/lib/words.mjs";

const step = (n, more = {}) => ({ event: "step", step: n, steps: 9, loss: 1 / n, smoothed_loss: 0.5, learning_rate: 1e-4, ...more });
const runOf = (...events) => events.reduce(take, emptyRun("a"));

test("a run's steps are taken once, whether they come from the file or live", () => {
  const run = runOf({ event: "start", step: 0, steps: 9 }, step(1), step(2), step(2), step(1), step(3));
  assert.deepEqual(columns(run.points)[0], [1, 2, 3]);
  assert.deepEqual(columns(run.points)[1], [1, 1 / 2, 1 / 3]);
  assert.equal(run.state, "running");
});

test("a resume keeps what was before it, from step 1, and drops what is made again", () => {
  const run = runOf({ event: "start", step: 0, steps: 9 }, step(1), step(2), step(3), { event: "stopped", step: 3 });
  assert.match(sentence(run), /^stopped at step 3 of 9; a checkpoint is kept/);
  take(run, { event: "resume", step: 2, steps: 12 });
  take(run, step(3, { steps: 12, loss: 7 }));
  assert.deepEqual(columns(run.points).slice(0, 2), [[1, 2, 3], [1, 1 / 2, 7]]);
  assert.deepEqual([run.planned, run.state], [12, "running"]);
});

test("long runs are thinned, their ends kept", () => {
  const run = emptyRun("a");
  for (let n = 1; n <= 5 * MOST_POINTS; n += 1) take(run, step(n));
  assert.ok(run.points.length <= 2 * MOST_POINTS);
  assert.deepEqual([run.points[0].step, run.points.at(-1).step], [1, 5 * MOST_POINTS]);
});

test("samples are shown once, errors are said", () => {
  const run = runOf(step(5), { event: "sample", step: 5, files: ["s.png"] }, { event: "sample", step: 5, files: ["s.png"] });
  assert.deepEqual(run.samples, [{ step: 5, file: "s.png" }]);
  assert.equal(sentence(take(run, { event: "error", step: 5, text: "out of memory" })), "out of memory");
});

test("numbers say what there is, and nothing else", () => {
  const shown = Object.fromEntries(numbers(runOf(step(2, { open_share: 0.25, seconds_left: 61, memory: 2 ** 31 }))));
  assert.equal(shown.step, "2 of 9");
  assert.equal(shown["gates open"], "25 %");
  assert.equal(shown.left, "1 min 1 s");
  assert.equal(shown.memory, "2.0 GiB");
  assert.equal("held out" in shown, false);
  const judged = runOf(step(2, { held_out_loss: 0.25, best_step: 2 }), step(3, { held_out_loss: null }));
  assert.deepEqual(columns(judged.points)[3], [0.25, null]);
  assert.deepEqual(["held out", "best at step"].map((name) => Object.fromEntries(numbers(judged))[name]), ["0.25", "2"]);
  assert.deepEqual([short(0), short(1e-4), short(0.1234), short(null)], ["0", "1.0e-4", "0.123", "–"]);
  assert.deepEqual([duration(null), duration(59.6), duration(7260)], ["–", "1 min 0 s", "2 h 1 min"]);
});

test("a new node is put beside another where it lies over none", () => {
  const graph = { nodes: [] };
  const node = { graph, pos: [430, 100], size: [200, 100] };
  graph.nodes.push({ pos: [430, 100], size: [300, 150] }, { pos: [600, 300], size: [100, 50] }, node);
  moveFree(node);
  assert.equal(node.pos[0], 430);
  assert.ok(node.pos[1] >= 300 + 50 + 30 && node.pos[1] < 300 + 50 + 30 + 30);
});

test("a row calls its file by its bare name where that is the only one", () => {
  const files = ["a/bot.safetensors", "b/bot.safetensors", "a/fish.v2.safetensors", "lora:c\\d.safetensors"];
  assert.deepEqual(files.map((name) => shortName(name, files)), ["a/bot.safetensors", "b/bot.safetensors", "fish.v2", "d"]);
});

test("the rows of a stack and its text are the same", () => {
  const rows = readRows("a.safetensors\n# sub/b | 0.5 | 0 | 0:1, 1:0\n\nlora:c | -1");
  assert.deepEqual(rows[0], { on: true, file: "a.safetensors", model: 1, clip: 1, schedule: "" });
  assert.deepEqual(rows[1], { on: false, file: "sub/b", model: 0.5, clip: 0, schedule: "0:1, 1:0" });
  assert.deepEqual([rows[2].model, rows[2].clip], [-1, -1]);
  assert.deepEqual(readRows(writeRows(rows)), rows);
  assert.deepEqual(moved([1, 2, 3], 0, 2), [2, 3, 1]);
  assert.deepEqual(moved([1, 2, 3], 0, -1), [1, 2, 3]);
});

test("curves are drawn as the core computes them", () => {
  assert.deepEqual(readPoints("0:1, 0.5:-0.25; 1:0"), [[0, 1], [0.5, -0.25], [1, 0]]);
  for (const bad of ["", "a", "1", "1:", ":1", "1:2:3"]) assert.equal(readPoints(bad), null, bad);
  assert.equal(writePoints([[0, 1], [1 / 3, 0.2]]), "0:1, 0.333:0.2");
  assert.ok(Math.abs(SHAPES.bell(0.5) - 1) < 1e-12 && Math.abs(SHAPES["cosine in"](0.25) - 0.14644660940672627) < 1e-12);
  const drawn = line("constant", 0.2, 1, "");
  assert.deepEqual([drawn[0], drawn[1], drawn[2], drawn.at(-1)], [[0, 0], [0.2, 0], [0.2, 1], [1, 1]]);
  assert.deepEqual(movedPoint([[0, 1], [0.5, 1], [1, 1]], 1, [1.5, 0]), [[0, 1], [1, 0], [1, 1]]);
});

test("a card says what is known", () => {
  const shown = facts({ method: ["foura", "spectral_a"], rank: [4, 4], layers: 8, base: "", steps: null, bytes: 74752, date: "2026-11-27" });
  assert.deepEqual(shown, [["", "FouRA, Spectral A"], ["rank", "4"], ["layers", "8"], ["base", "not said"], ["", "73 KiB"], ["", "2026-11-27"]]);
  assert.equal(size(3.5 * 2 ** 20), "3.5 MiB");
});

test("layers of several ranks are said from the least to the most", () => {
  const shown = facts({ method: ["lora"], rank: [4, 8, 16], base: "sdxl", bytes: 1024, date: "" });
  assert.deepEqual(shown[1], ["rank", "4 to 16"]);
});

test("the page speaks its language, and English where it has no word", () => {
  const words = { zh: { [SECTION]: { Resume: "继续", "{step} of {planned}": "{planned} 中的 {step}" } } };
  useWords(words, "zh");
  assert.deepEqual([t("Resume"), t("Use now"), t("{step} of {planned}", { step: 2, planned: 0 })], ["继续", "Use now", "0 中的 2"]);
  for (const [tables, language] of [[words, "fr"], [null, "zh"], [{ zh: {} }, "zh"]]) {
    useWords(tables, language);
    assert.equal(t("Resume"), "Resume");
  }
});

test("a fusion is judged in plain words", () => {
  const found = { concepts: ["a", "b"], bleeding: 3, shared: 8, warns: true };
  assert.equal(verdictOf(found), "These two will bleed in 3 of 8 layers: use closed-form, or distil.");
  assert.match(verdictOf({ ...found, concepts: ["a", "b", "c"] }), /^Some of these will bleed in 3 of 8/);
  assert.match(verdictOf({ ...found, warns: false }), /^Their weights overlap in 3 layers only/);
  assert.equal(verdictOf({ ...found, warns: false, bleeding: 0 }), "Their weights hardly overlap. Pictures may blend all the same: compare sum with closed-form.");
  assert.match(verdictOf({ ...found, shared: 0 }), /^No layer is changed by two of them/);
});

test("a base that does not fit is marked, as far as that is known", () => {
  const demo = { comfyClass: "SpectralAdapters_LoadDemoModel" };
  const other = { comfyClass: "CheckpointLoaderSimple" };
  assert.match(mismatchOf("sdxl", demo), /made for sdxl/);
  assert.match(mismatchOf("mini", other), /demo model/);
  for (const [base, node] of [["mini", demo], ["sdxl", other], ["", demo], ["mini", null]]) assert.equal(mismatchOf(base, node), "");
});

test("nodes are found by the host's ids, in subgraphs too", () => {
  const inner = { getNodeById: (id) => ({ 5: "found" })[id] ?? null };
  const graph = { getNodeById: (id) => ({ 12: { subgraph: inner } })[id] ?? null };
  assert.equal(nodeById(graph, "12:5"), "found");
  assert.equal(nodeById(graph, "7"), null);
  assert.equal(nodeById(graph, undefined), null);
});

test("a place is free where no other node reaches into it, with its title", () => {
  const node = { pos: [0, 0], size: [100, 100] };
  const graph = { nodes: [node, { pos: [0, 300], size: [50, 50] }, { pos: [200, 0], size: [50, 500] }] };
  node.graph = graph;
  assert.ok(isFree(node, [0, 100, 100, 170]));
  assert.equal(isFree(node, [0, 100, 100, 171]), false);
  assert.equal(isFree(node, [0, 100, 201, 50]), false);
});

test("errors are the project's words alone", () => {
  assert.equal(inputErrors({ errors: [{ message: "Custom validation failed", details: "rows - line 1" }, { message: "b" }] }), "rows - line 1\nb");
  assert.equal(exceptionText({ exception_message: "no such file\n" }), "no such file");
  const full = "run a: out of memory: choose checkpointing 'full'\n\nThis error means you ran out of memory on your GPU.\n\nTIPS: …";
  assert.equal(exceptionText({ exception_message: full }), "run a: out of memory: choose checkpointing 'full'");
});

test("reports are kept, the newest hundred, and a broken store is none", () => {
  const table = new Map();
  const storage = { getItem: (key) => table.get(key) ?? null, setItem: (key, value) => table.set(key, value) };
  for (let n = 0; n < 120; n += 1) keep(storage, `g:${n}`, { text: String(n) });
  const kept = readKept(storage);
  assert.equal(kept.size, 100);
  assert.equal(kept.get("g:119").text, "119");
  assert.equal(readKept({ getItem: () => "{" }).size, 0);
});

test("the files behind a fusion are found through strengths and stacks", () => {
  const node = (comfyClass, values, inputs = {}) => ({
    comfyClass,
    widgets: Object.entries(values).map(([name, value]) => ({ name, value })),
    inputs: Object.keys(inputs).map((name) => ({ name })),
    getInputNode: (slot) => Object.values(inputs)[slot],
  });
  const loader = (name) => node("SpectralAdapters_LoadFouRA", { adapter_name: name });
  const stack = node("SpectralAdapters_AdapterStack", { rows: "c\n# d\nlora:e" });
  const strength = node("SpectralAdapters_AdapterStrength", {}, { adapter: loader("b"), adapters: stack });
  const fuse = node("SpectralAdapters_FuseAdapters", {}, { adapter_1: loader("a"), adapters: strength, model: loader("x") });
  assert.deepEqual(filesBehind(fuse), ["a", "b", "c"]);
});

test("open gates are cells by layer and by noise, what was not seen keeps its last share", () => {
  const run = emptyRun("a");
  take(run, step(10, { open_by_layer: { a: 0.25, b: 1 }, open_by_level: [0.5, null, 1] }));
  take(run, step(20, { open_by_level: [null, 0.25, 0] }));
  const { layers, levels } = gateCells(run);
  assert.deepEqual(layers.map(({ share }) => share), [0.25, 1]);
  assert.match(layers[0].title, /^a: 25 % of the gates are open$/);
  assert.deepEqual(levels.map(({ share }) => share), [0.5, 0.25, 0]);
  assert.match(levels[1].title, /^noise 90 to 80 %: 25 %/);
});

test("a named curve becomes points on its line, and a new point goes into the widest gap", () => {
  assert.deepEqual(asPoints("linear out", 0.2, 1), [[0, 0], [0.2, 0], [0.2, 1], [0.6, 0.5], [1, 0]]);
  assert.deepEqual(widestGap([[0, 1], [0.2, 0], [1, 1]]), [0.6, 0.5]);
  for (const [curve, start, end] of Object.values(PRESETS)) assert.ok(curve in SHAPES && start < end);
});

test("nodes show what their choice reads", () => {
  const node = (kind, values) => ({
    comfyClass: `SpectralAdapters_${kind}`,
    widgets: Object.entries(values).map(([name, value]) => ({ name, value })),
  });
  assert.deepEqual(unread(node("AdapterStrength", { curve: "bell" })), ["custom_curve"]);
  assert.deepEqual(unread(node("AdapterStrength", { curve: "custom" })), ["start_percent", "end_percent"]);
  assert.ok(unread(node("FuseAdapters", { method: "sum" })).includes("prompts"));
  assert.deepEqual(unread(node("FuseAdapters", { method: "closed-form-rank" })), []);
  assert.deepEqual(unread(node("CompareAdapters", { compare: "fusion methods" })), ["run_name"]);
});

test("an option node shows what the method of its trainer reads, through other option nodes", () => {
  const trainer = { id: 3, comfyClass: "SpectralAdapters_TrainAdapter", widgets: [{ name: "method", value: "lora" }] };
  const nodes = new Map([[3, trainer]]);
  const links = { 7: { target_id: 2 }, 8: { target_id: 3 } };
  const graph = { getNodeById: (id) => nodes.get(id), links };
  const option = (id, link) => {
    const made = { id, graph, comfyClass: "SpectralAdapters_TrainLayers", outputs: [{ type: "SPECTRAL_TRAIN_OPTIONS", links: [link] }] };
    const input = { optional: { targets: ["STRING", {}], columns: ["STRING", { methods: ["spectral_a"] }], alpha: ["FLOAT", { methods: ["lora"] }] } };
    made.constructor = { nodeData: { input } };
    nodes.set(id, made);
    return made;
  };
  const [near, far] = [option(2, 8), option(1, 7)];
  assert.equal(methodBehind(far), "lora");
  assert.deepEqual([unread(near), unread(far)], [["columns"], ["columns"]]);
  trainer.widgets[0].value = "spectral_a";
  assert.deepEqual(unread(far), ["alpha"]);
});

test("a node that only passes settings on has no report", () => {
  assert.equal(reports({ outputs: [{ type: "SPECTRAL_TRAIN_OPTIONS" }] }), false);
  assert.equal(reports({ outputs: [{ type: "MODEL" }] }), true);
});
