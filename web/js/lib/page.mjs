// Small helpers for the page: elements, styles in the theme's colours, nodes by the host's ids.

export const PREFIX = "SpectralAdapters_";

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

export function colour(name, fallback) {
  const found = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return found || fallback;
}

// "12" in the root graph, "12:5" for node 5 inside the subgraph node 12
export function nodeById(graph, id) {
  let found = null;
  let inside = graph;
  for (const part of String(id ?? "").split(":")) {
    found = inside?.getNodeById?.(Number(part)) ?? inside?.getNodeById?.(part) ?? null;
    inside = found?.subgraph;
  }
  return found;
}

export function allNodes(graph) {
  const found = [];
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    found.push(node);
    if (node.subgraph) found.push(...allNodes(node.subgraph));
  }
  return found;
}

export const isOurs = (node) => Boolean(node?.comfyClass?.startsWith(PREFIX));

export const widgetNamed = (node, name) => node.widgets?.find((widget) => widget.name === name);

// A widget of the page alone, at least so high. It is never saved: saved workflows count widgets by their place.
export function addPageWidget(node, name, content, least) {
  const height = typeof least === "function" ? least : () => least;
  const widget = node.addDOMWidget(name, name, content, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: height,
    getHeight: height,
  });
  widget.serialize = false;
  return widget;
}

// A new object, which Nodes 2.0 notices; what computes its values goes on doing so.
function withHidden(options, hidden) {
  const made = Object.create(Object.getPrototypeOf(options), Object.getOwnPropertyDescriptors(options));
  made.hidden = hidden;
  return made;
}

// Shows the node's widgets but for these; true where that changed.
export function showAllBut(node, hidden) {
  let changed = false;
  for (const widget of node.widgets ?? []) {
    const wanted = hidden.has(widget.name);
    if (Boolean(widget.spectralHidden) === wanted) continue;
    widget.spectralHidden = wanted;
    widget.hidden = wanted;
    if (widget.options) widget.options = withHidden(widget.options, wanted);
    if (widget.element) widget.element.style.display = wanted ? "none" : "";
    changed = true;
  }
  if (changed) {
    makeRoom(node);
    node.graph?.setDirtyCanvas?.(true, true);
  }
  return changed;
}

// Makes room for the node's widgets, and never takes any away.
export function makeRoom(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
}

const TITLE = 30; // the height of a node's title, which is above its place

// Whether no other node of its graph reaches into a place, given as x, y, width and height.
export function isFree(node, [x, y, width, height]) {
  return (node.graph?.nodes ?? []).every((other) => {
    const [left, top] = [other.pos[0], other.pos[1] - TITLE];
    const [right, bottom] = [left + other.size[0], other.pos[1] + other.size[1]];
    return other === node || left >= x + width || right <= x || top >= y + height || bottom <= y;
  });
}

// Moves a new node down until it lies over no other.
export function moveFree(node) {
  const [x, y] = node.pos;
  const [width, height] = node.size;
  const isOver = (top) => !isFree(node, [x, top - TITLE, width, height + TITLE]);
  let top = y;
  while (isOver(top) && top < y + 10000) top += TITLE;
  node.pos = [x, top];
}

const STYLES = `
.spectral { box-sizing: border-box; width: 100%; height: 100%; overflow: auto; padding: 4px 6px;
  font: 12px/1.35 system-ui, sans-serif; color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222);
  border-radius: 4px; user-select: text; }
.spectral:focus-visible, .spectral :focus-visible { outline: 2px solid #4c8dff; outline-offset: 1px; }
.spectral-report { min-height: 84px; white-space: pre-wrap; overflow-wrap: anywhere; }
.spectral-report[data-kind=error] { border-left: 3px solid #e5534b; }
.spectral-report[data-kind=hint] { color: var(--descrip-text, #999); }
.spectral-row { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: center; }
.spectral-numbers b { font-weight: 600; }
.spectral-muted { color: var(--descrip-text, #999); }
.spectral-warn { color: #d29922; }
.spectral button { font: inherit; color: inherit; background: var(--comfy-menu-bg, #333); cursor: pointer;
  border: 1px solid var(--border-color, #555); border-radius: 4px; padding: 2px 8px; }
.spectral button:disabled { opacity: .4; cursor: default; }
.spectral button.spectral-word { border-radius: 10px; padding: 0 8px; }
.spectral input, .spectral select { font: inherit; color: inherit; background: var(--comfy-menu-bg, #333);
  border: 1px solid var(--border-color, #555); border-radius: 3px; min-width: 0; }
.spectral-training { display: flex; flex-direction: column; gap: 4px; }
.spectral-training .spectral-report { flex: none; height: auto; min-height: 0; max-height: 110px; padding: 2px 4px; }
.spectral-training .spectral-report[data-kind=hint] { display: none; }
.spectral-training[data-state=new] > :not([role=status]) { display: none; }
.spectral-training .spectral-report[data-kind=error] { order: -1; } .spectral-training > .spectral-buttons { order: -2; }
.spectral-plot { flex: 1 1 120px; min-height: 120px; overflow: hidden; }
.spectral-stack-row { display: flex; gap: 4px; align-items: center; margin-bottom: 3px; }
.spectral-stack-row select { width: 60px; }
.spectral circle { cursor: grab; }
.spectral-samples { display: flex; gap: 6px; overflow-x: auto; flex: none; }
.spectral-samples figure { margin: 0; text-align: center; font-size: 10px; }
.spectral-samples img { height: 64px; display: block; image-rendering: auto; border-radius: 3px; }
.spectral-gates { display: grid; grid-template-columns: max-content 1fr; gap: 2px 6px; flex: none; font-size: 10px; align-items: center; }
.spectral-gates div { display: flex; gap: 1px; } .spectral-gates i { flex: 1; height: 9px; background: #3fb950; }
.spectral-axis { display: flex; justify-content: space-between; font-size: 10px; }
.spectral-presets { display: flex; gap: 3px; margin-bottom: 2px; } .spectral button.spectral-preset { padding: 0 3px; font-size: 10px; white-space: nowrap; }
.spectral .u-wrap { position: relative; } .spectral .uplot canvas { display: block; position: relative;
  width: 100%; height: 100%; } .spectral .u-over, .spectral .u-under, .spectral .u-axis { position: absolute; }
.spectral .u-legend, .spectral .u-select, .spectral .u-cursor-x, .spectral .u-cursor-y { display: none; }
`;

export function addStyles() {
  if (document.getElementById("spectral-styles")) return;
  const sheet = element("style", { id: "spectral-styles" });
  sheet.textContent = STYLES;
  document.head.append(sheet);
}
