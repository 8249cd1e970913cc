// Comfort for the page; every node works without it. Two things:
// the report of a node appears as text on the node once it has run, and the hashes of the adapter files that
// were loaded go into the workflow's own notes, so that a saved workflow still finds a file that was renamed.

import { app } from "../../../scripts/app.js";

const PREFIX = "SpectralAdapters_";
const NOTES = "spectral_adapters";
const HEIGHT = 120;

function reportBox(node) {
  const known = node.widgets?.find((widget) => widget.name === "report_text");
  if (known) return known.element;
  const box = document.createElement("textarea");
  box.className = "comfy-multiline-input";
  box.readOnly = true;
  box.spellcheck = false;
  box.style.whiteSpace = "pre-wrap";
  // added last and never saved: saved workflows count widgets by their place
  const widget = node.addDOMWidget("report_text", "report_text", box, {
    serialize: false,
    getMinHeight: () => HEIGHT,
  });
  widget.serialize = false;
  return box;
}

function showReport(node, text) {
  const box = reportBox(node);
  box.value = text;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  app.graph?.setDirtyCanvas(true, true);
}

function rememberFiles(files) {
  const graph = app.rootGraph ?? app.graph;
  if (!graph) return;
  graph.extra ??= {};
  const notes = (graph.extra[NOTES] ??= {});
  for (const file of files) notes[file.name] = file.sha256;
}

app.registerExtension({
  name: "SpectralAdapters.Report",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith(PREFIX)) return;
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.call(node, output);
      const text = output?.text;
      if (text?.length) showReport(node, Array.isArray(text) ? text.join("\n") : String(text));
      if (Array.isArray(output?.[NOTES])) rememberFiles(output[NOTES]);
    };
  },
});
