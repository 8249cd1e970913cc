// The page's own words in its language. English is in the code; others are in locales/<language>/main.json, below
// the name SECTION, where the English text is the key. What has no translation stays English.

export const SECTION = "spectral_adapters";
let known = {};

// tables: language -> the host's texts of it
export function useWords(tables, language) {
  known = tables?.[language]?.[SECTION] ?? {};
}

// "{name}" in a text stands for values.name
export function t(text, values = {}) {
  return (known[text] ?? text).replace(/\{(\w+)\}/g, (all, name) => values[name] ?? all);
}

// Marks a text that t translates later, when it is shown.
export const word = (text) => text;
