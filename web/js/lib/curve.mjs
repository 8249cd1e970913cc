// The strength over the denoising, drawn on Adapter Strength. The text custom_curve stays the value.

import { addPageWidget, element, widgetNamed } from "./page.mjs";
import { t, word } from "./words.mjs";

export const STRENGTH = "SpectralAdapters_AdapterStrength";
const [WIDTH, HEIGHT, EDGE] = [300, 84, 8]; // WIDTH: until it is seen
const SVG = "http://www.w3.org/2000/svg";

export const SHAPES = {
  constant: () => 1,
  "linear in": (x) => x,
  "linear out": (x) => 1 - x,
  "cosine in": (x) => (1 - Math.cos(Math.PI * x)) / 2,
  "cosine out": (x) => (1 + Math.cos(Math.PI * x)) / 2,
  bell: (x) => (1 - Math.cos(2 * Math.PI * x)) / 2,
};

// What a button sets: curve, start and end; the tooltip says what it does to the picture.
export const PRESETS = {
  [word("always")]: ["constant", 0, 1, word("Over all steps.")],
  [word("early")]: ["constant", 0, 0.4, word("Layout and shape only; the details are the model's own.")],
  [word("late")]: ["constant", 0.4, 1, word("Details and style only; the layout is the model's own.")],
  [word("middle")]: ["bell", 0, 1, word("Most in the middle, where shapes get their form.")],
  [word("fade in")]: ["linear in", 0, 1, word("From nothing to all.")],
  [word("fade out")]: ["linear out", 0, 1, word("From all to nothing.")],
};

// "0:1, 0.5:0.3" as pairs; null where it cannot be read.
export function readPoints(text) {
  const parts = text.split(/[,;\n]/).map((part) => part.trim()).filter(Boolean);
  const points = parts.map((part) => part.split(":").map((word) => (word.trim() === "" ? NaN : Number(word))));
  const good = points.every((point) => point.length === 2 && point.every(Number.isFinite));
  return good && points.length ? points : null;
}

const round = (value) => Number(value.toFixed(3));

export const writePoints = (points) => points.map(([place, strength]) => `${round(place)}:${round(strength)}`).join(", ");

// The line to draw: pairs of place and strength, 0 outside of the window.
export function line(curve, start, end, text) {
  if (curve === "custom") {
    const points = readPoints(text);
    if (!points) return [];
    return [[0, points[0][1]], ...points, [1, points.at(-1)[1]]];
  }
  const shape = SHAPES[curve] ?? SHAPES.constant;
  const inside = Array.from({ length: 41 }, (_, i) => [start + ((end - start) * i) / 40, shape(i / 40)]);
  return [[0, 0], [start, 0], ...inside, [end, 0], [1, 0]].slice(start > 0 ? 0 : 2, end < 1 ? undefined : -2);
}

// A point moved, between its neighbours.
export function movedPoint(points, index, [place, strength]) {
  const least = index === 0 ? 0 : points[index - 1][0];
  const most = index === points.length - 1 ? 1 : points[index + 1][0];
  return points.map((point, i) => (i === index ? [Math.min(most, Math.max(least, place)), strength] : point));
}

// A named curve as a few points on its line.
export function asPoints(curve, start, end) {
  const shape = SHAPES[curve] ?? SHAPES.constant;
  const inside = [0, 0.5, 1].map((x) => [round(start + (end - start) * x), shape(x)]);
  return [...(start > 0 ? [[0, 0], [start, 0]] : []), ...inside, ...(end < 1 ? [[end, 0], [1, 0]] : [])];
}

export function widestGap(points) {
  if (points.length < 2) return [points[0]?.[0] > 0.5 ? 0 : 1, points[0]?.[1] ?? 1];
  const gaps = points.slice(1).map((point, i) => point[0] - points[i][0]);
  const at = gaps.indexOf(Math.max(...gaps));
  return [(points[at][0] + points[at + 1][0]) / 2, (points[at][1] + points[at + 1][1]) / 2].map(round);
}

class Curve {
  constructor(node, host) {
    Object.assign(this, { node, host, width: WIDTH });
    this.svg = this.make("svg", { width: "100%", height: "100%", preserveAspectRatio: "none" });
    this.svg.setAttribute("aria-label", t("strength over the denoising"));
    const presets = Object.entries(PRESETS).map(([name, [curve, start, end, title]]) =>
      element("button", { type: "button", class: "spectral-preset", title: t(title), onclick: () => this.preset(curve, start, end) }, t(name)),
    );
    this.svg.style.height = `${HEIGHT}px`;
    this.box = element("div", { class: "spectral" }, element("div", { class: "spectral-presets" }, ...presets));
    this.plot = element("div", { title: t("Double click adds a point, Delete takes it away; arrows move it.") }, this.svg);
    const add = () => this.addPoint();
    this.box.lastChild.append(element("button", { type: "button", class: "spectral-preset", title: t("A point to move by mouse or arrow keys; the curve becomes custom."), onclick: add }, t("+ point")));
    const axis = element("div", { class: "spectral-axis spectral-muted" }, element("span", {}, t("noise")), element("span", {}, t("picture")));
    this.range = element("span");
    axis.firstChild.after(this.range);
    this.box.append(this.plot, axis);
    this.svg.addEventListener("dblclick", (event) => this.addPoint(this.placeOf(event)));
    this.svg.addEventListener("pointermove", (event) => this.drag(event));
    for (const name of ["pointerup", "pointerleave"]) this.svg.addEventListener(name, () => (this.held = null));
    for (const name of ["curve", "start_percent", "end_percent", "custom_curve"]) {
      const widget = widgetNamed(node, name);
      const before = widget.callback;
      widget.callback = function (...values) {
        const result = before?.apply(this, values);
        node.spectralCurve?.draw();
        return result;
      };
    }
    addPageWidget(node, "strength_curve", this.box, 152);
    new ResizeObserver(() => this.resize()).observe(this.plot);
    this.draw();
  }

  // One unit is one pixel, so that points are round.
  resize() {
    const found = this.plot.clientWidth;
    if (found < 50 || found === this.width) return;
    this.width = found;
    this.draw();
  }

  preset(curve, start, end) {
    this.set({ curve, start_percent: start, end_percent: end });
  }

  make(tag, values) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(values)) made.setAttribute(name, value);
    return made;
  }

  value(name) {
    return widgetNamed(this.node, name).value;
  }

  at([place, strength]) {
    const low = this.low ?? 0;
    return [EDGE + place * (this.width - 2 * EDGE), HEIGHT - EDGE - ((strength - low) / (this.high - low || 1)) * (HEIGHT - 2 * EDGE)];
  }

  placeOf(event) {
    const frame = this.svg.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * this.width;
    const y = ((event.clientY - frame.top) / frame.height) * HEIGHT;
    const strength = this.low + ((HEIGHT - EDGE - y) / (HEIGHT - 2 * EDGE)) * (this.high - this.low);
    return [Math.min(1, Math.max(0, (x - EDGE) / (this.width - 2 * EDGE))), Math.round(20 * strength) / 20];
  }

  get points() {
    return this.value("curve") === "custom" ? readPoints(this.value("custom_curve")) : null;
  }

  write(points) {
    this.set({ curve: "custom", custom_curve: writePoints(points) });
  }

  set(values) {
    for (const [name, value] of Object.entries(values)) {
      const widget = widgetNamed(this.node, name);
      widget.value = value;
      widget.callback?.(value);
    }
    this.host.changed?.();
  }

  // Where the user points, else in the widest gap; a named curve first becomes points of its own.
  addPoint(point) {
    const points = this.points ?? asPoints(this.value("curve"), this.value("start_percent"), this.value("end_percent"));
    const added = [...points, point ?? widestGap(points)].sort((a, b) => a[0] - b[0]);
    this.write(added);
  }

  drag(event) {
    if (this.held == null || !this.points) return;
    event.stopPropagation();
    this.write(movedPoint(this.points, this.held, this.placeOf(event)));
  }

  press(event, index) {
    const steps = { ArrowLeft: [-0.05, 0], ArrowRight: [0.05, 0], ArrowUp: [0, 0.05], ArrowDown: [0, -0.05] };
    const points = this.points;
    if (event.key === "Delete" && points.length > 1) this.write(points.filter((_, i) => i !== index));
    else if (event.key in steps) {
      const [x, y] = steps[event.key];
      this.write(movedPoint(points, index, [points[index][0] + x, points[index][1] + y]));
    } else return;
    event.preventDefault();
    event.stopPropagation();
    this.svg.querySelectorAll("circle")[Math.min(index, this.points.length - 1)]?.focus();
  }

  draw() {
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    const drawn = line(this.value("curve"), this.value("start_percent"), this.value("end_percent"), this.value("custom_curve"));
    this.low = Math.min(0, ...drawn.map(([, strength]) => strength));
    this.high = Math.max(1, ...drawn.map(([, strength]) => strength));
    this.range.textContent = t("strength {low} to {high}", { low: round(this.low), high: round(this.high) });
    const path = drawn.map((point) => this.at(point).join(",")).join(" ");
    const [left, zero] = this.at([0, 0]);
    const [right] = this.at([1, 0]);
    const base = this.make("line", { x1: left, x2: right, y1: zero, y2: zero, stroke: "var(--border-color, #666)" });
    const curve = this.make("polyline", { points: path, fill: "none", stroke: "#4c8dff", "stroke-width": 2, "vector-effect": "non-scaling-stroke" });
    const knobs = (this.points ?? []).map((point, index) => {
      const [cx, cy] = this.at(point);
      const label = t("at {place} strength {strength}", { place: round(point[0]), strength: round(point[1]) });
      const knob = this.make("circle", { cx, cy, r: 4.5, fill: "#4c8dff", tabindex: 0, role: "slider", "aria-label": label, "aria-valuetext": label });
      knob.addEventListener("pointerdown", (event) => {
        event.stopPropagation();
        this.held = index;
      });
      knob.addEventListener("keydown", (event) => this.press(event, index));
      return knob;
    });
    this.svg.replaceChildren(base, curve, ...knobs);
  }
}

export function addCurve(node, host) {
  node.spectralCurve = new Curve(node, host);
}
