// What the chosen file says about itself, in the loaders, before anything runs.

import { addPageWidget, element, widgetNamed } from "./page.mjs";
import { t } from "./words.mjs";

export const LOADERS = {
  SpectralAdapters_LoadFouRA: ["adapter_name", "adapter"],
  SpectralAdapters_LoadSpectralAdapter: ["adapter_name", "adapter"],
  SpectralAdapters_LoadLoRAAsAdapter: ["lora_name", "lora"],
};
const HEIGHT = 88;
const METHODS = { foura: "FouRA", spectral_a: "Spectral A", spectral_r: "Spectral R", lora: "LoRA", orthogonal: "OFT" };

// The words of a card: pairs of a name and a value.
export function facts(card) {
  const found = [];
  if (card.method?.length) found.push(["", card.method.map((name) => METHODS[name] ?? name).join(", ")]);
  if (card.rank?.length) found.push([t("rank"), span(card.rank)]);
  if (card.layers) found.push([t("layers"), String(card.layers)]);
  found.push([t("base"), card.base || t("not said")]);
  if (card.steps) found.push([t("steps"), String(card.steps)]);
  found.push(["", size(card.bytes)], ["", card.date]);
  return found;
}

// The ranks of the layers, sorted: one, or from the least to the most.
function span(ranks) {
  const [least, most] = [ranks[0], ranks.at(-1)];
  return least === most ? String(least) : t("{least} to {most}", { least, most });
}

export function size(bytes) {
  if (bytes < 2 ** 20) return `${Math.max(1, Math.round(bytes / 1024))} KiB`;
  return `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

export async function copyWord(word, button) {
  await navigator.clipboard?.writeText(word);
  const before = button.textContent;
  button.textContent = t("copied");
  setTimeout(() => (button.textContent = before), 900);
}

export function wordButtons(words) {
  return words.map((word) => {
    const button = element("button", { type: "button", class: "spectral-word", title: t("Copy this trigger word") }, word);
    button.addEventListener("click", () => copyWord(word, button));
    return button;
  });
}

// Whether a file's base is not that of the model node before the loader, as far as that can be known unrun.
export function mismatchOf(base, modelNode) {
  if (!base || !modelNode) return "";
  const isDemo = modelNode.comfyClass === "SpectralAdapters_LoadDemoModel";
  if (isDemo && base !== "mini") return t("made for {base}: it does not fit the demo model", { base });
  if (!isDemo && base === "mini" && /Checkpoint|UNET/.test(modelNode.comfyClass ?? "")) {
    return t("made for the demo model: it fits no other");
  }
  return "";
}

class Card {
  constructor(node, host) {
    [this.widgetName, this.kind] = LOADERS[node.comfyClass];
    Object.assign(this, { node, host, shown: null });
    this.box = element("div", { class: "spectral spectral-card", role: "group", "aria-label": t("the chosen file") });
    addPageWidget(node, "file_card", this.box, HEIGHT);
    const widget = widgetNamed(node, this.widgetName);
    const before = widget.callback;
    widget.callback = function (...values) {
      const result = before?.apply(this, values);
      node.spectralCard.refresh();
      return result;
    };
  }

  // Asked now and then: what is connected changes, and nothing tells.
  look() {
    const slot = this.node.inputs?.findIndex((input) => input.name === "model") ?? -1;
    const found = this.shown ? mismatchOf(this.shown.base, slot < 0 ? null : this.node.getInputNode?.(slot)) : "";
    if (found === (this.mismatch ?? "")) return;
    this.mismatch = found;
    this.draw(this.shown);
  }

  async refresh() {
    const name = widgetNamed(this.node, this.widgetName)?.value;
    this.asked = name;
    if (!name || name === "none" || name.startsWith("(")) return this.draw(null, t("No file is chosen."));
    try {
      const card = await this.host.card(name, this.kind);
      if (this.asked === name) this.draw(card);
    } catch (error) {
      if (this.asked === name) this.draw(null, error.message);
    }
    return undefined;
  }

  draw(card, text = "") {
    this.shown = card;
    if (!card) return this.box.replaceChildren(element("span", { class: "spectral-muted" }, text));
    const words = card.words.length ? wordButtons(card.words) : [element("i", {}, t("none named"))];
    const lines = element(
      "div",
      { style: "flex:1;min-width:0" },
      element("div", { class: "spectral-row" }, `${t("trigger words")} `, ...words),
      element(
        "div",
        { class: "spectral-row spectral-muted" },
        ...facts(card).map(([label, value]) => element("span", {}, label ? `${label} ` : "", element("b", {}, value))),
      ),
      this.mismatch ? element("div", { class: "spectral-warn", role: "status" }, this.mismatch) : null,
    );
    const picture = card.preview
      ? element("img", { src: this.host.previewUrl(card.name, this.kind), alt: t("preview"), style: "height:72px;border-radius:3px" })
      : null;
    const row = element("div", { style: "display:flex;gap:8px" }, ...(picture ? [picture] : []), lines);
    return this.box.replaceChildren(row);
  }
}

export function addCard(node, host) {
  node.spectralCard = new Card(node, host);
  setTimeout(() => node.spectralCard.refresh(), 0); // once its value is known
}
