// Which widgets a node shows: those that its choice reads. What is hidden keeps its value.

import { PREFIX, showAllBut, widgetNamed } from "./page.mjs";

const value = (node, name) => widgetNamed(node, name)?.value ?? "";
const TRAINERS = new Set([`${PREFIX}TrainAdapter`, `${PREFIX}ConceptSlider`]);
const LOOKING = ["prompts", "sample_steps", "sample_cfg", "sample_seed", "save_statistics", "sample_rounds"];

// The names that a node's choice does not read.
const UNREAD = {
  FuseAdapters: (node) => {
    const method = String(value(node, "method"));
    return method.startsWith("closed-form") || method === "gradient" ? [] : LOOKING;
  },
  AdapterStrength: (node) => (value(node, "curve") === "custom" ? ["start_percent", "end_percent"] : ["custom_curve"]),
  CompareAdapters: (node) => {
    const compare = value(node, "compare");
    return [...(compare === "fusion methods" ? [] : ["methods"]), ...(compare === "kept steps of a run" ? [] : ["run_name"])];
  },
};

// The method of the trainer behind an option node, through other option nodes; "" where there is none.
export function methodBehind(node, seen = new Set()) {
  if (!node || seen.has(node)) return "";
  seen.add(node);
  if (TRAINERS.has(node.comfyClass)) return String(value(node, "method"));
  for (const output of node.outputs ?? []) {
    for (const id of output.links ?? []) {
      const link = node.graph?.getLink?.(id) ?? node.graph?.links?.get?.(id) ?? node.graph?.links?.[id];
      const method = methodBehind(node.graph?.getNodeById?.(link?.target_id), seen);
      if (method) return method;
    }
  }
  return "";
}

// Settings say in the node's definition which methods read them.
function notOf(method, inputs) {
  if (!method) return [];
  return Object.entries(inputs).filter(([, [, more]]) => more?.methods && !more.methods.includes(method)).map(([name]) => name);
}

export function unread(node) {
  const kind = node.comfyClass?.slice(PREFIX.length);
  if (UNREAD[kind]) return UNREAD[kind](node);
  if (!(node.outputs ?? []).some((output) => output.type === "SPECTRAL_TRAIN_OPTIONS")) return [];
  const given = node.constructor?.nodeData?.input ?? {};
  const inputs = { ...given.required, ...given.optional };
  const names = notOf(methodBehind(node), inputs);
  return names.length < Object.keys(inputs).length - 1 ? names : []; // a node of other methods alone stays as it is
}

export const refreshShown = (node) => showAllBut(node, new Set(unread(node)));
