// Tables that can be sorted by column and filtered by words and provenance.

const ROWS_AT_ONCE = 200;

// rows: [{cells, values, published, search, draw}]; search: the text in which filters look, in lower case; draw() makes the
// <tr> and is called once. atOnce: number of rows shown at first. after: called with the rows that pass the filter.
// Returns {node, filter}: filter({words, published, measured}) shows the rows that match and returns their number.
function sortableTable({ columns, numeric, rows, name, atOnce = ROWS_AT_ONCE, after }) {
  let order = null; // {column, direction}; null: the order of the report
  let most = atOnce; // rows to show
  let wanted = { words: [], published: true, measured: true };
  const body = el("tbody");
  const more = el("button", { type: "button", class: "more", onclick: () => { most += 4 * ROWS_AT_ONCE; show(); } });
  const heads = columns.map((title, column) =>
    el("th", { scope: "col", "aria-sort": "none", class: numeric[column] ? "number" : null },
      el("button", { type: "button", onclick: () => sortBy(column) }, ...wordsOf(title), el("span", { class: "arrow", "aria-hidden": "true" }))));
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...heads)), body);

  // The first click puts the better end first (the arrow in the title points to it), the second the other end, the third
  // restores the order of the report.
  function sortBy(column) {
    const first = columns[column].includes("\u2191") ? -1 : 1;
    if (!order || order.column !== column) order = { column, direction: first };
    else order = order.direction === first ? { column, direction: -first } : null;
    heads.forEach((head, index) => {
      const direction = order && index === order.column ? order.direction : 0;
      head.setAttribute("aria-sort", direction > 0 ? "ascending" : direction < 0 ? "descending" : "none");
    });
    show();
  }

  // Shows the rows that pass the filter, in the order chosen; returns their number.
  function show() {
    const chosen = rows.filter((row) =>
      (row.published ? wanted.published : wanted.measured) && wanted.words.every((word) => row.search.includes(word)));
    if (order) chosen.sort((a, b) => compareCells(a, b, order.column, order.direction));
    body.replaceChildren(...chosen.slice(0, most).map((row) => (row.node ??= row.draw())));
    if (!chosen.length) body.append(el("tr", {}, el("td", { colspan: columns.length, class: "none" }, "no row matches")));
    more.hidden = chosen.length <= most;
    more.textContent = `${countOf(chosen.length - most, "more row", "more rows")}`;
    if (after) after(chosen);
    return chosen.length;
  }

  const box = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, table);
  let width = 0;
  new ResizeObserver(() => { // in a table that is too wide, intervals go below their values
    if (box.clientWidth === width) return;
    width = box.clientWidth;
    table.classList.remove("tight");
    table.classList.toggle("tight", box.scrollWidth > width);
  }).observe(box);
  return {
    node: el("div", {}, box, more),
    filter(next) { wanted = next; most = atOnce; return show(); },
  };
}

// Compares by number if both cells have one (whatever the interval), else by text; empty cells come last in either
// direction.
function compareCells(a, b, column, direction) {
  const [x, y] = [a.values[column], b.values[column]];
  const withNumber = (x !== null) - (y !== null); // not 0: only one of them has a number, and comes first
  if (withNumber) return -withNumber;
  if (x !== null) return (x - y) * direction;
  const dashes = (a.cells[column] === "-") - (b.cells[column] === "-");
  return dashes || a.cells[column].localeCompare(b.cells[column], "en", { numeric: true }) * direction;
}

// A search field and, if `both` kinds of rows exist, boxes for published and measured. apply: function that filters the rows
// as sortableTable's filter does and returns the number that match, which is shown. total: number of all rows.
function filterBar({ label, total, both, apply }) {
  const words = el("input", { type: "search", placeholder: "Filter rows", "aria-label": `Filter rows of ${label}`, oninput: run });
  const boxes = ["published", "measured"].map((kind) => el("input", { type: "checkbox", checked: true, "data-kind": kind, onchange: run }));
  const count = el("output", { class: "count" });
  function run() {
    const [published, measured] = boxes.map((box) => box.checked);
    const shown = apply({ words: words.value.toLowerCase().split(/\s+/).filter(Boolean), published, measured });
    count.textContent = shown === total ? countOf(total, "row", "rows") : `${shown.toLocaleString("en")} of ${countOf(total, "row", "rows")}`;
  }
  run();
  return el("div", { class: "bar" }, words, ...(both ? boxes.map((box) => el("label", {}, box, ` ${box.dataset.kind}`)) : []), count);
}

function tableSection(table) {
  const parts = table.sections.map((section) => sectionOf(section, table.title));
  const rows = table.sections.flatMap((section) => section.lines);
  const bar = filterBar({
    label: table.title, total: rows.length, both: new Set(rows.map((row) => row.published)).size === 2,
    apply: (wanted) => parts.reduce((sum, part) => sum + part.filter(wanted), 0),
  });
  const left = table.sections.reduce((sum, section) => sum + section.left_out, 0);
  return el("section", { id: table.name, class: "block" }, el("h2", {}, table.title), rows.length > 8 ? bar : null,
    left ? el("p", { class: "note" }, `${countOf(left, "row is", "rows are")} left out here; ${table.name}.csv has all of them.`) : null,
    ...parts.map((part) => part.node));
}

// A column with the same text in every row, and without records, is replaced by a remark below the rows.
function withoutConstants(section) {
  const lines = section.lines;
  const constant = section.columns.map((_, column) => column > 0 && lines.length > 1 &&
    lines.every((line) => line.cells[column] === lines[0].cells[column] && !line.records[column]));
  if (!constant.includes(true)) return section;
  const kept = (list) => list.filter((_, column) => !constant[column]);
  // Where all rows are the paper's, their footnote says so.
  const texts = section.columns.map((name, column) => `${name} ${lines[0].cells[column]}`).filter((text, column) => constant[column] && text !== "Source paper");
  return {
    ...section, columns: kept(section.columns), numeric: kept(section.numeric), remarks: inAllRows(texts, section.remarks),
    lines: lines.map((line) => ({ ...line, cells: kept(line.cells), values: kept(line.values), records: kept(line.records), marks: kept(line.marks) })),
  };
}

// The remarks with these texts in the remark on what all rows share, which is the first; it is made if it is missing.
function inAllRows(texts, remarks) {
  if (!texts.length) return remarks;
  const start = "All rows: ";
  const at = remarks.findIndex((text) => text.startsWith(start));
  const rest = at < 0 ? "." : `, ${remarks[at].slice(start.length)}`;
  return [`${start}${texts.join(", ")}${rest}`, ...remarks.filter((_, index) => index !== at)];
}

// A section as {node, filter}, as of sortableTable. title: of the table, for a section without a heading.
function sectionOf(complete, title) {
  const section = withoutConstants(complete);
  const notes = el("ul", { class: "notes" });
  const published = `as published (${section.origin})`;
  const rows = section.lines.map((line) => ({
    ...line,
    search: [...line.cells, ...line.notes.map((mark) => section.footnotes[mark]), line.published ? "published" : "measured"].join(" ").toLowerCase(),
    draw: () => drawLine(line, section),
  }));
  const table = sortableTable({
    columns: section.columns, numeric: section.numeric, rows, name: section.heading || title,
    after: (chosen) => { // only the notes of visible rows
      const marks = new Set(chosen.flatMap((row) => row.notes));
      const words = Object.entries(section.footnotes).filter(([mark]) => marks.has(mark));
      if (chosen.some((row) => row.published)) words.unshift(["\u2020", published]);
      notes.replaceChildren(...words.map(([mark, text]) => el("li", {}, el("sup", {}, mark), ` ${text}`)),
        ...section.remarks.map((text) => el("li", {}, text)));
    },
  });
  const heading = section.heading ? el("p", { class: "heading" }, section.heading) : null;
  return { node: el("div", { class: "part" }, heading, table.node, notes), filter: table.filter };
}

function drawLine(line, section) {
  const marks = [...(line.published ? ["\u2020"] : []), ...line.notes];
  const title = line.notes.map((mark) => `${mark}: ${section.footnotes[mark]}`).join("\n");
  return el("tr", { class: line.published ? "published" : "measured" }, ...line.cells.map((text, index) => {
    const kind = [section.numeric[index] ? "number" : "", line.marks[index] || ""].join(" ").trim();
    if (index === 0) {
      return el("th", { scope: "row", class: text.length > 24 ? null : "short" }, text, marks.length ? el("sup", { title: title || null }, marks.join(",")) : null);
    }
    const shown = valueParts(text);
    if (line.marks[index] === "tie") shown.splice(1, 0, el("span", { class: "sign", title: "tied with the best" }, "\u2009="));
    const id = line.records[index];
    return el("td", { class: kind || null },
      ...(id && recordOf(id) ? [el("button", { type: "button", class: "value", onclick: () => showRecords([id]) }, ...shown)] : shown));
  }));
}
