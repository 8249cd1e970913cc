// Comfort for the page; every node works without it, and everything here can be done through the API.
// In lib: report (of every node), panel and training (while it runs), card (of a file), stack (its rows), curve
// (of a strength), verdict (before fusing), shown (which widgets), library (the sidebar), page (small helpers).

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { allNodes, addStyles, isOurs, makeRoom, moveFree, nodeById } from "./lib/page.mjs";
import { addReport, exceptionText, inputErrors, reports, restoreReport, showReport } from "./lib/report.mjs";
import { addCard, LOADERS } from "./lib/card.mjs";
import { addCurve, STRENGTH } from "./lib/curve.mjs";
import { libraryTab } from "./lib/library.mjs";
import { addPanel, TRAINERS } from "./lib/panel.mjs";
import { refreshShown } from "./lib/shown.mjs";
import { addStack, STACK } from "./lib/stack.mjs";
import { addVerdict, FUSERS } from "./lib/verdict.mjs";
import { useWords } from "./lib/words.mjs";

const NOTES = "spectral_adapters"; // the hashes of loaded files in the workflow's notes
const LOADER = "SpectralAdapters_LoadFouRA";
const rootGraph = () => app.rootGraph ?? app.graph;

async function answer(path, options) {
  const response = await api.fetchApi(`/spectral_adapters${path}`, options);
  const found = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(found.error ?? `${response.status} ${response.statusText}`);
  return found;
}

const query = (values) => new URLSearchParams(values).toString();

async function choices(kind, widget) {
  const found = await (await api.fetchApi(`/object_info/${kind}`)).json();
  const names = found[kind]?.input.required[widget]?.[0] ?? [];
  return names.filter((name) => name !== "none" && !name.startsWith("("));
}

const host = {
  adapterNames: () => choices(LOADER, "adapter_name"),
  allFiles: async () => {
    const loras = await choices("SpectralAdapters_LoadLoRAAsAdapter", "lora_name");
    return [...(await host.adapterNames()), ...loras.map((name) => `lora:${name}`)];
  },
  fetchRuns: () => answer("/runs").catch(() => []),
  card: (name, kind) => answer(`/card?${query({ name, kind })}`),
  previewUrl: (name, kind) => api.apiURL(`/spectral_adapters/preview?${query({ name, kind })}`),
  overlap: (names) => answer(`/overlap?${query(names.map((name) => ["name", name]))}`),
  fetchRun: (name) => answer(`/runs/${encodeURIComponent(name)}`).catch(() => null),
  keep: async (name) => (await answer(`/runs/${encodeURIComponent(name)}/keep`, { method: "POST" })).file,
  interrupt: () => api.fetchApi("/interrupt", { method: "POST" }),
  queue: () => app.queuePrompt(0, 1),
  changed: () => app.canvas?.setDirty?.(true, true), // a widget by our hand: the canvas shows it
  sampleUrl: (name, file) =>
    api.apiURL(
      `/view?type=output&filename=${encodeURIComponent(file)}` +
        `&subfolder=${encodeURIComponent(`spectral_adapters_runs/${name}/samples`)}`,
    ),
  useAdapter: async (file, beside) => {
    await app.refreshComboInNodes?.();
    const node = LiteGraph.createNode(LOADER);
    const [x, y] = beside ? [beside.pos[0] + beside.size[0] + 30, beside.pos[1]] : app.canvas?.graph_mouse ?? [0, 0];
    node.pos = [x, y];
    (beside?.graph ?? app.canvas?.graph ?? app.graph).add(node);
    if (beside) moveFree(node);
    const widget = node.widgets.find((each) => each.name === "adapter_name");
    widget.value = file;
    widget.callback?.(file);
    return node;
  },
};

function rememberFiles(files) {
  const graph = rootGraph();
  if (!graph) return;
  graph.extra ??= {};
  const notes = (graph.extra[NOTES] ??= {});
  for (const file of files) notes[file.name] = file.sha256;
}

function onResult(node, output) {
  const text = output?.text;
  if (text?.length) showReport(node, Array.isArray(text) ? text.join("\n") : String(text));
  const run = output?.spectral_run?.[0];
  if (run && node.spectralPanel) {
    node.properties.spectral_run = run;
    node.spectralPanel.restore();
  }
  const bleed = output?.spectral_bleed?.[0];
  if (bleed) node.spectralVerdict?.measured(bleed);
  if (Array.isArray(output?.[NOTES])) rememberFiles(output[NOTES]);
}

function watchErrors() {
  api.addEventListener("execution_error", ({ detail }) => {
    const node = nodeById(rootGraph(), detail?.node_id);
    if (isOurs(node)) showReport(node, exceptionText(detail), "error");
  });
  // The host has no event for a prompt that it refuses; it only keeps what was wrong with it.
  let seen = null;
  setInterval(() => {
    const errors = app.lastNodeErrors;
    if (errors === seen) return;
    seen = errors;
    for (const [id, found] of Object.entries(errors ?? {})) {
      const node = nodeById(rootGraph(), id);
      if (isOurs(node)) showReport(node, inputErrors(found), "error");
    }
  }, 500);
}

function watchTraining() {
  api.addEventListener("spectral_adapters.run", ({ detail }) => {
    for (const node of allNodes(rootGraph())) {
      if (node.spectralPanel?.isFor(detail)) node.spectralPanel.live(detail);
    }
  });
  const again = () => {
    for (const node of allNodes(rootGraph())) if (node.spectralPanel?.name) node.spectralPanel.restore();
  };
  api.addEventListener("reconnected", again);
  for (const ended of ["execution_interrupted", "execution_error", "execution_success"]) api.addEventListener(ended, again);
}

// The host keeps all languages of all packs; English needs none of them.
async function readWords() {
  const language = app.extensionManager?.setting?.get?.("Comfy.Locale") ?? "en";
  if (language === "en") return;
  const response = await api.fetchApi("/i18n").catch(() => null);
  if (response?.ok) useWords(await response.json().catch(() => null), language);
}

app.registerExtension({
  name: "SpectralAdapters.Page",
  init: readWords,
  setup() {
    addStyles();
    watchErrors();
    watchTraining();
    app.extensionManager?.registerSidebarTab?.(libraryTab(host));
    setInterval(() => {
      for (const node of allNodes(rootGraph())) {
        if (!isOurs(node)) continue;
        refreshShown(node);
        node.spectralVerdict?.refresh();
        node.spectralCard?.look();
        if (node.spectralStack && node.spectralStack.shown !== node.spectralStack.widget.value) node.spectralStack.draw();
      }
    }, 1000);
  },
  nodeCreated(node) {
    if (!isOurs(node)) return;
    addStyles();
    if (TRAINERS.has(node.comfyClass)) addPanel(node, host);
    if (node.comfyClass in LOADERS) addCard(node, host);
    if (node.comfyClass === STRENGTH) addCurve(node, host);
    if (node.comfyClass === STACK) addStack(node, host);
    if (FUSERS.has(node.comfyClass)) addVerdict(node, host);
    if (reports(node)) addReport(node);
    refreshShown(node);
    makeRoom(node);
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.call(node, output);
      onResult(node, output);
    };
    const configured = node.onConfigure;
    node.onConfigure = function (saved) {
      configured?.call(node, saved);
      restoreReport(node);
      node.spectralPanel?.restore();
      node.spectralCard?.refresh();
      node.spectralCurve?.draw();
      node.spectralStack?.draw();
      makeRoom(node);
    };
  },
});
