// Fuse Adapters before it runs: which of the connected files will bleed into which, from the files alone.

import { addPageWidget, element, widgetNamed } from "./page.mjs";
import { t } from "./words.mjs";
import { readRows } from "./stack.mjs";

export const FUSERS = new Set(["SpectralAdapters_FuseAdapters", "SpectralAdapters_DistilAdapters"]);
const LOADERS = new Set(["SpectralAdapters_LoadFouRA", "SpectralAdapters_LoadSpectralAdapter"]);

// The files behind an input, through Adapter Strength and stacks; null where something else is on the way.
export function filesBehind(node, names = ["adapter_1", "adapter_2", "adapters"]) {
  const found = [];
  for (const [slot, input] of (node.inputs ?? []).entries()) {
    if (!names.includes(input.name)) continue;
    const source = node.getInputNode?.(slot);
    if (!source) continue;
    if (LOADERS.has(source.comfyClass)) found.push(widgetNamed(source, "adapter_name").value);
    else if (source.comfyClass === "SpectralAdapters_AdapterStack") {
      found.push(...filesBehind(source, ["adapters"]));
      for (const row of readRows(widgetNamed(source, "rows").value)) {
        if (row.on && !row.file.startsWith("lora:")) found.push(row.file);
      }
    } else if (source.comfyClass === "SpectralAdapters_AdapterStrength") {
      found.push(...filesBehind(source, ["adapters", "adapter"]));
    }
  }
  return found;
}

// In plain words, for the worst of them.
export function sentence({ concepts, bleeding, shared, warns }) {
  if (!shared) return t("No layer is changed by two of them: their weights cannot overlap. Use sum.");
  if (!warns && bleeding) return t("Their weights overlap in {bleeding} layers only. Pictures may blend all the same: compare sum with closed-form.", { bleeding });
  if (!warns) return t("Their weights hardly overlap. Pictures may blend all the same: compare sum with closed-form.");
  const counts = { bleeding, shared };
  if (concepts.length > 2) return t("Some of these will bleed in {bleeding} of {shared} layers: use closed-form, or distil.", counts);
  return t("These two will bleed in {bleeding} of {shared} layers: use closed-form, or distil.", counts);
}

class Verdict {
  constructor(node, host) {
    Object.assign(this, { node, host, asked: "" });
    this.box = element("div", { class: "spectral", role: "status", "aria-label": t("before the run") });
    addPageWidget(node, "fuse_verdict", this.box, 84);
    this.say(t("Connect two loaders: what they will do to each other appears here."));
  }

  say(text) {
    this.box.replaceChildren(element("span", { class: "spectral-muted" }, text));
  }

  // Asked now and then: loaders far up may change, and nothing tells.
  async refresh() {
    const files = filesBehind(this.node);
    const asked = files.join("\n");
    if (asked === this.asked) return;
    this.asked = asked;
    if (files.length < 2) {
      this.say(t("Connect two loaders: what they will do to each other appears here."));
      return;
    }
    this.say(t("looking at the files …"));
    try {
      const found = await this.host.overlap(files);
      if (this.asked === asked) this.draw(found);
    } catch (error) {
      if (this.asked === asked) this.say(error.message);
    }
  }

  // After the run: what it saw, and what is left of each concept.
  measured(found) {
    const kept = found.kept.every((value) => value == null) ? [] : [this.row(t("kept"), found.kept, (value) => this.cell(value))];
    this.box.replaceChildren(element("div", {}, element("b", {}, t("In the last run:"))), this.table(found, kept));
  }

  draw(found) {
    this.box.replaceChildren(element("div", {}, element("b", {}, sentence(found))), this.table(found));
  }

  table({ concepts, bleed }, more = []) {
    const head = element("tr", {}, element("th", {}, ""), ...concepts.map((name) => element("th", {}, name)));
    const rows = bleed.map((cells, i) =>
      this.row(t("on {concept}", { concept: concepts[i] }), cells, (value, j) => this.cell(value, i === j ? 0 : value)),
    );
    const title = t("What each concept does on the other's inputs, of what that does itself");
    return element("table", { style: "font-size:10px;border-spacing:2px", title }, head, ...rows, ...more);
  }

  row(name, values, cell) {
    return element("tr", {}, element("th", {}, name), ...values.map(cell));
  }

  // loud: how red it is, from 0 to 1
  cell(value, loud = 0) {
    const style = `background:rgb(229 83 75 / ${(0.8 * Math.min(1, loud ?? 0)).toFixed(2)});padding:0 6px;text-align:center`;
    return element("td", { style }, value == null ? "–" : value.toFixed(2));
  }
}

export function addVerdict(node, host) {
  node.spectralVerdict = new Verdict(node, host);
}
