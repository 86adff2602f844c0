// Builds the page from its data.

const data = JSON.parse(document.getElementById("data").textContent);
POOL = data.pool;
for (const record of data.records) RECORDS.set(record.id, record);

// left: a note on the grids that are left out.
function samplesSection(grids, left) {
  return el("section", { id: "samples", class: "block" }, el("h2", {}, "Samples"),
    left ? el("p", { class: "note" }, left) : null,
    el("div", { class: "grids" }, ...grids.map((grid) => el("figure", {},
      el("img", { src: grid.src, alt: `Samples of ${grid.title}`, loading: "lazy" }),
      el("figcaption", {}, grid.title, grid.records.length ? " " : "",
        grid.records.length ? el("button", { type: "button", class: "value", onclick: () => showRecords(grid.records) }, "records") : "")))));
}

// The numbers of records, and what was not used.
function summary(counts) {
  const protocols = el("table", {}, el("thead", {}, el("tr", {}, ...["Protocol", "Measured", "Published"].map((text, index) =>
    el("th", { scope: "col", class: index ? "number" : null }, text)))), el("tbody", {}, ...counts.protocols.map((each) =>
    el("tr", {}, el("th", { scope: "row" }, each.name), el("td", { class: "number" }, each.measured.toLocaleString("en")),
      el("td", { class: "number" }, each.published.toLocaleString("en"))))));
  return el("section", { id: "summary" },
    el("p", {}, `${countOf(counts.measured, "measured record", "measured records")}, ${countOf(counts.published, "published", "published")}; `,
      counts.problems.count || counts.conflicts.count
        ? el("a", { href: "#left-out" }, `${countOf(counts.problems.count, "line", "lines")} skipped, ${countOf(counts.conflicts.count, "conflict", "conflicts")}`)
        : "no line skipped, no conflict", "."),
    el("div", { class: "scroll" }, protocols));
}

function leftOut({ problems, conflicts }) {
  const list = (title, found) => (found.count ? [el("h3", {}, `${title}: ${found.count.toLocaleString("en")}`),
    el("ul", {}, ...found.texts.map((text) => el("li", {}, text)),
      found.count > found.texts.length ? el("li", {}, `and ${(found.count - found.texts.length).toLocaleString("en")} more`) : null)] : []);
  return el("section", { id: "left-out", class: "block" }, el("h2", {}, "Not in this report"),
    ...list("Lines of record files that could not be used", problems), ...list("Conflicts: one identity, two values", conflicts));
}

function build() {
  const { problems, conflicts } = data.summary;
  const blocks = [ // [id, title in the contents, element]
    ...data.tables.map((table) => [table.name, table.title, tableSection(table)]),
    ...data.figures.map((figure) => [figure.name, figure.title, figureSection(figure)]),
    ...(data.grids.length || data.grids_left_out ? [["samples", "Samples", samplesSection(data.grids, data.grids_left_out)]] : []),
    ...(data.records.length ? [["records", "Records", recordsSection(data)]] : []),
    ...(problems.count || conflicts.count ? [["left-out", "Not in this report", leftOut(data.summary)]] : []),
  ];
  document.getElementById("page").append(
    summary(data.summary),
    el("nav", { "aria-label": "Contents" }, el("details", { open: window.innerWidth > 700 }, el("summary", {}, "Contents"), el("ul", {}, ...blocks.map(([name, title]) => el("li", {}, el("a", { href: `#${encodeURIComponent(name)}` }, title)))))),
    ...blocks.map(([, , node]) => node));
  document.body.append(panel);
  document.body.append(el("footer", { class: "note" }, `backbone-harness ${data.version}`));
  openLinkedRecord();
  window.addEventListener("hashchange", openLinkedRecord);
}

// Opens the record that the page's address names: its fragment is #record- and the beginning of the record's id.
function openLinkedRecord() {
  const asked = window.location.hash.slice(1);
  const found = asked.startsWith("record-") && data.records.find((record) => record.id.startsWith(asked.slice(7)));
  if (found) showRecords([found.id]);
}

build();
