// The sidebar tab: adapters with what they are, trainings with how far they are, and "use in graph".

import { facts, wordButtons } from "./card.mjs";
import { element } from "./page.mjs";
import { t, word } from "./words.mjs";

const STATES = { running: word("running"), stopped: word("stopped"), finished: word("finished") };

const entry = (...children) => element("div", { style: "padding:6px 0;border-bottom:1px solid var(--border-color, #444)" }, ...children);

function adapterEntry(name, host) {
  const more = element("div", { class: "spectral-muted" }, "…");
  const use = element("button", { type: "button", onclick: () => host.useAdapter(name) }, t("Use in graph"));
  const made = entry(element("div", {}, element("b", {}, name)), more, element("div", { class: "spectral-row" }, use));
  const fill = async () => {
    try {
      const card = await host.card(name, "adapter");
      const picture = card.preview
        ? [element("img", { src: host.previewUrl(name, "adapter"), alt: "", style: "max-height:96px;display:block" })]
        : [];
      const words = element("div", { class: "spectral-row" }, ...wordButtons(card.words));
      more.replaceChildren(...picture, facts(card).map(([label, value]) => `${label} ${value}`.trim()).join(" · "), words);
    } catch (error) {
      more.textContent = error.message;
    }
  };
  return { made, fill };
}

function runEntry(run, host) {
  const said = element("span", { class: "spectral-muted" }, t("{state}, step {step}", { state: t(STATES[run.state] ?? run.state), step: run.step }));
  const use = element("button", {
    type: "button",
    onclick: async () => {
      try {
        await host.useAdapter(await host.keep(run.name));
      } catch (error) {
        said.textContent = error.message;
      }
    },
  }, t("Use now"));
  return entry(element("b", {}, run.name), " ", said, " ", use);
}

export function libraryTab(host) {
  return {
    id: "spectral_adapters.library",
    icon: "pi pi-wave-pulse",
    title: t("Adapters"),
    tooltip: t("Spectral adapters: files and trainings"),
    type: "custom",
    render: async (box) => {
      const filter = element("input", { type: "search", placeholder: t("filter"), "aria-label": t("filter"), style: "width:100%" });
      const [list, trainings] = [element("div"), element("div")];
      const frame = element("div", { class: "spectral", style: "height:100%" }, filter, element("h4", {}, t("Trainings")), trainings, element("h4", {}, t("Adapters")), list);
      box.replaceChildren(frame);
      const [files, runs] = await Promise.all([host.adapterNames(), host.fetchRuns()]);
      trainings.replaceChildren(...runs.map((run) => runEntry(run, host)), runs.length ? "" : t("none yet"));
      const draw = async () => {
        const shown = files.filter((name) => name.toLowerCase().includes(filter.value.toLowerCase())).slice(0, 100);
        const entries = shown.map((name) => adapterEntry(name, host));
        list.replaceChildren(...entries.map(({ made }) => made), shown.length ? "" : t("none"));
        for (const { fill } of entries) await fill();
      };
      filter.addEventListener("input", draw);
      await draw();
    },
  };
}
