// Records: the panel that shows one with the command that measures it again, and the list of all.

const RECORDS = new Map();
let POOL = []; // items that records share: a record has their indices
const panel = el("aside", { id: "panel", hidden: true, "aria-label": "Record", tabindex: "-1" });
let opener = null; // what had the focus before the panel

function recordOf(id) {
  return RECORDS.get(id);
}

// Shows a record in full; of several, first a choice.
function showRecords(ids) {
  const records = ids.map(recordOf).filter(Boolean);
  if (!records.length) return;
  if (panel.hidden) opener = document.activeElement;
  panel.replaceChildren(
    el("button", { type: "button", class: "close", "aria-label": "Close", onclick: closePanel }, "\u00d7"),
    ...(records.length === 1 ? recordParts(records[0]) : [
      el("h2", {}, `${records.length} records`),
      el("ul", { class: "choice" }, ...records.map((record) =>
        el("li", {}, el("button", { type: "button", class: "value", onclick: () => showRecords([record.id]) }, recordText(record))))),
    ]));
  panel.hidden = false;
  panel.scrollTop = 0;
  document.body.classList.add("pinned");
  if (records.length === 1) window.history.replaceState(null, "", `#record-${records[0].id.slice(0, 16)}`);
  panel.focus({ preventScroll: true });
}

// Closes the panel and gives the focus back to what opened it.
function closePanel() {
  panel.hidden = true;
  document.body.classList.remove("pinned");
  clearPins();
  window.history.replaceState(null, "", "#");
  if (opener && opener.isConnected) opener.focus({ preventScroll: true });
}

// `dit-b-4, FID-50K 3.27 [3.21, 3.33], seed 0`.
function recordText(record) {
  const seed = record.seed === null ? "" : `, seed ${record.seed}`;
  return `${record.system}, ${record.metric} ${record.text}${seed}`;
}

// The contents of the panel for one record.
function recordParts(record) {
  const again = POOL[record.again];
  return [
    el("h2", {}, record.system),
    el("p", { class: "headline" }, `${record.metric} `, el("strong", {}, ...valueParts(record.text))),
    el("p", { class: "note" }, record.published ? `published, ${record.where}` : `measured, protocol ${record.protocol}`),
    el("h3", {}, record.published ? "Where it is from" : "How to measure it again"),
    ...again.notes.map((text) => el("p", {}, text)),
    ...again.commands.map(commandOf),
    again.placeholders ? el("p", { class: "note" }, again.placeholders) : "",
    ...[["record", record.own], ...record.groups.map((number) => POOL[number])].flatMap(([heading, pairs]) => [
      el("h3", {}, heading[0].toUpperCase() + heading.slice(1)),
      el("dl", {}, ...pairs.flatMap(([name, text]) => [el("dt", {}, name.replaceAll("_", " ")), el("dd", {}, text)])),
    ]),
  ];
}

// The command with a button that selects it and, where the browser allows that, copies it.
function commandOf(command) {
  const code = el("code", {}, ...wordsOf(command));
  const copy = el("button", { type: "button", onclick: async () => {
    window.getSelection().selectAllChildren(code);
    try {
      await navigator.clipboard.writeText(command);
      copy.textContent = "copied";
    } catch {
      copy.textContent = "selected";
    }
  } }, "copy");
  return el("div", { class: "command" }, el("pre", {}, code), copy);
}

function recordsSection(data) {
  const columns = ["System", "Metric", "Value", "N", "Training steps", "Seed", "Sampler", "Sampling steps", "Guidance", "Protocol", "Source", "Record"];
  const numeric = [false, false, true, true, true, true, false, true, false, false, false, false];
  const rows = data.records.map((record) => {
    const textOf = (value) => (value === null ? "-" : String(value));
    const cells = [record.system, record.metric, record.text, record.n.toLocaleString("en"), record.steps_text, textOf(record.seed), record.sampler,
      textOf(record.sampling_steps), record.guidance, record.protocol, record.where || "measured", record.id.slice(0, 12)];
    const values = [null, null, record.value, record.n, record.steps, record.seed, null, record.sampling_steps, null, null, null, null];
    return { cells, values, published: record.published, search: cells.join(" ").toLowerCase() + (record.published ? " published" : ""),
      draw: () => el("tr", { class: record.published ? "published" : "measured" }, ...cells.map((text, index) => {
        if (index === 0) return el("th", { scope: "row", class: text.length > 24 ? null : "short" }, text);
        const shown = valueParts(text);
        return el("td", { class: numeric[index] ? "number" : null },
          ...(index === 2 ? [el("button", { type: "button", class: "value", onclick: () => showRecords([record.id]) }, ...shown)] : shown));
      })) };
  });
  const table = sortableTable({ columns, numeric, rows, name: "Records", atOnce: 50 });
  const bar = filterBar({ label: "records", total: rows.length, both: new Set(rows.map((row) => row.published)).size === 2, apply: table.filter });
  const left = data.summary.records_left_out;
  return el("section", { id: "records", class: "block" }, el("h2", {}, "Records"), bar,
    left ? el("p", { class: "note" }, `${countOf(left, "record stands", "records stand")} in no table or figure of this page or beyond its room, and ${left === 1 ? "is" : "are"} left out; the record files have them.`) : null,
    table.node);
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !panel.hidden) closePanel();
});
