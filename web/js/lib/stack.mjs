// The rows of Adapter Stack. The text stays the value: this reads it, shows it, and writes it back.

import { addPageWidget, element, widgetNamed } from "./page.mjs";
import { t } from "./words.mjs";

export const STACK = "SpectralAdapters_AdapterStack";
export const SCHEDULES = ["", "linear in", "linear out", "cosine in", "cosine out", "bell"];
const OFF = "#";
const WIDTH = 460; // in which a row's file can be read

export function readRows(text) {
  return text
    .split("\n")
    .map((line) => line.trim())
    .filter(Boolean)
    .map((line) => {
      const on = !line.startsWith(OFF);
      const [file = "", model = "", clip = "", schedule = ""] = (on ? line : line.slice(1)).split("|").map((part) => part.trim());
      const strength = model === "" ? 1 : Number(model);
      return { on, file, model: strength, clip: clip === "" ? strength : Number(clip), schedule };
    });
}

export function writeRows(rows) {
  return rows
    .map(({ on, file, model, clip, schedule }) => {
      const parts = [file, model, clip, ...(schedule ? [schedule] : [])];
      return `${on ? "" : `${OFF} `}${parts.join(" | ")}`;
    })
    .join("\n");
}

export function moved(rows, from, to) {
  const found = [...rows];
  if (to < 0 || to >= found.length) return found;
  found.splice(to, 0, ...found.splice(from, 1));
  return found;
}

// What a row calls its file: without folder and ending, where no other file is called so.
export function shortName(file, files) {
  const bare = (name) => name.replace(/^lora:/, "").split(/[\\/]/).at(-1).replace(/\.[^.]*$/, "");
  return files.some((other) => other !== file && bare(other) === bare(file)) ? file : bare(file);
}

class Stack {
  constructor(node, host) {
    Object.assign(this, { node, host, files: [] });
    this.widget = widgetNamed(node, "rows");
    this.box = element("div", { class: "spectral spectral-stack", role: "group", "aria-label": t("adapters") });
    addPageWidget(node, "stack_rows", this.box, 170);
    this.load();
  }

  async load() {
    this.files = await this.host.allFiles();
    this.draw();
  }

  get rows() {
    return readRows(this.widget.value ?? "");
  }

  write(rows) {
    this.widget.value = writeRows(rows);
    this.widget.callback?.(this.widget.value);
    this.node.graph?.change?.();
    this.draw();
    this.host.changed?.();
  }

  change(index, values) {
    this.write(this.rows.map((row, i) => (i === index ? { ...row, ...values } : row)));
  }

  draw() {
    this.shown = this.widget.value;
    const add = element("button", { type: "button", onclick: () => this.add() }, t("+ Add adapter"));
    this.box.replaceChildren(...this.rows.map((row, index) => this.row(row, index)), element("div", {}, add));
  }

  add() {
    const file = this.files.find((name) => !this.rows.some((row) => row.file === name)) ?? this.files[0] ?? "";
    this.write([...this.rows, { on: true, file, model: 1, clip: 1, schedule: "" }]);
  }

  row(row, index) {
    const number = (name, label) =>
      element("input", {
        type: "number", step: "0.05", value: row[name], "aria-label": label, title: label, style: "width:48px",
        onchange: (event) => this.change(index, { [name]: Number(event.target.value) || 0 }),
      });
    const label = (name) => (SCHEDULES.includes(name) ? name || t("always") : shortName(name, this.files));
    const options = (names, chosen) =>
      [...new Set([...names, chosen])].map((name) => element("option", { value: name, selected: name === chosen }, label(name)));
    const select = (names, name, label, style) =>
      element(
        "select",
        { "aria-label": label, title: name === "file" ? row.file : label, style, onchange: (event) => this.change(index, { [name]: event.target.value }) },
        ...options(names, row[name]),
      );
    const button = (label, text, act, disabled = false) =>
      element("button", { type: "button", title: label, "aria-label": label, disabled, onclick: act, style: "padding:0 5px" }, text);
    const made = element(
      "div",
      { class: "spectral-stack-row", draggable: "true", "data-index": index, style: `opacity:${row.on ? 1 : 0.5}` },
      element("input", {
        type: "checkbox", checked: row.on, "aria-label": t("{file} on", { file: row.file }), title: t("on or off"),
        onchange: (event) => this.change(index, { on: event.target.checked }),
      }),
      select(this.files, "file", t("file"), "flex:1"),
      number("model", t("strength on the model")),
      number("clip", t("strength on the text encoder")),
      select(SCHEDULES, "schedule", t("when in the denoising"), "width:72px"),
      button(t("move up"), "↑", () => this.write(moved(this.rows, index, index - 1)), index === 0),
      button(t("move down"), "↓", () => this.write(moved(this.rows, index, index + 1)), index === this.rows.length - 1),
      button(t("remove"), "×", () => this.write(this.rows.filter((_, i) => i !== index))),
    );
    made.addEventListener("dragstart", (event) => event.dataTransfer.setData("text/spectral-row", String(index)));
    made.addEventListener("dragover", (event) => event.preventDefault());
    made.addEventListener("drop", (event) => {
      event.preventDefault();
      const from = Number(event.dataTransfer.getData("text/spectral-row"));
      this.write(moved(this.rows, from, index));
    });
    return made;
  }
}

export function addStack(node, host) {
  const widget = widgetNamed(node, "rows");
  widget.hidden = true; // its text is what the rows show
  widget.options.hidden = true;
  widget.computeSize = () => [0, -4];
  if (widget.element) widget.element.style.display = "none";
  node.spectralStack = new Stack(node, host);
  node.setSize([Math.max(WIDTH, node.size[0]), node.size[1]]);
}
