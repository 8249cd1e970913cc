// The report of a node: room for it from the start, kept over undo, reload, tabs and cached runs.

import { addPageWidget, element } from "./page.mjs";
import { t, word } from "./words.mjs";

const PROPERTY = "spectral_report";
const HEIGHT = 104;
const MOST = 6000; // characters that a saved workflow carries
const HINT = word("The report appears here once the node has run.");
const HINTS = {
  SpectralAdapters_LoadDemoModel: [
    word("A miniature Stable Diffusion that comes with the pack."),
    word("Its latent goes to KSampler: 20 steps, cfg 4, ddim, simple."),
    word("Prompts such as: a large red striped star on a blue background"),
  ],
};
const TIPS = "This error means you ran out of memory"; // what the host appends to ours, which says what to do
export const reports = (node) => !(node.outputs ?? []).some((output) => output.type === "SPECTRAL_TRAIN_OPTIONS");
const STORE = "spectral_adapters.reports"; // in the browser, for what undo and reload take out of the workflow
const MOST_KEPT = 100;

// Graph and node -> report, the oldest first; nothing where the browser keeps nothing.
export function readKept(storage) {
  try {
    return new Map(JSON.parse(storage.getItem(STORE) ?? "[]"));
  } catch {
    return new Map();
  }
}

export function keep(storage, key, report) {
  const kept = readKept(storage);
  kept.delete(key);
  kept.set(key, report);
  try {
    storage.setItem(STORE, JSON.stringify([...kept].slice(-MOST_KEPT)));
  } catch {
    // a full or forbidden store: the report is still on the node
  }
}

const keyOf = (node) => `${node.graph?.rootGraph?.id ?? node.graph?.id ?? ""}:${node.id}`;

export function addReport(node) {
  const box = element("div", { class: "spectral spectral-report", tabindex: 0, role: "status" });
  node.spectralReport = box;
  if (node.spectralPanel) node.spectralPanel.box.append(box);
  else addPageWidget(node, "report_text", box, HEIGHT);
  draw(node);
}

export function showReport(node, text, kind = "done") {
  if (!node?.spectralReport) return;
  const report = { text: String(text).slice(0, MOST), kind };
  keep(localStorage, keyOf(node), report);
  node.properties[PROPERTY] = report;
  draw(node);
  node.spectralPanel?.grow();
}

// A workflow was loaded, by the user or by undo.
export function restoreReport(node) {
  if (!node.spectralReport) return;
  const before = readKept(localStorage).get(keyOf(node));
  if (before) node.properties[PROPERTY] = before;
  draw(node);
}

function draw(node) {
  const report = node.properties?.[PROPERTY];
  node.spectralReport.textContent = report?.text ?? (HINTS[node.comfyClass] ?? [HINT]).map((text) => t(text)).join("\n");
  node.spectralReport.dataset.kind = report?.text ? report.kind : "hint";
}

// What the host says about a node that failed: its inputs' errors, or the exception's message.
export function inputErrors(found) {
  return (found?.errors ?? []).map((error) => error.details || error.message).join("\n");
}

export function exceptionText(detail) {
  return String(detail?.exception_message ?? "").split(TIPS)[0].trim();
}
