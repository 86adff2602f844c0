// Curves: one SVG for each panel, redrawn when its width changes. A mark under the pointer or with the focus shows a tip;
// a click or Enter pins it and opens its records.

const NEAR = 28; // pixels within which the pointer finds a mark
const MANY = 30; // a line with more marks is drawn without them, as in the static figures (_MANY of drawing.py)
let pinned = null; // the mark whose records are open; a redrawn chart rings it again

const DARK = window.matchMedia("(prefers-color-scheme: dark)");

function clearPins() {
  pinned = null;
  document.querySelectorAll(".pin").forEach((ring) => ring.remove());
}

// The figure's colour; on a dark background half way to white, so that dark colours are visible.
function tone(colour) {
  if (!DARK.matches) return colour;
  return `#${[1, 3, 5].map((at) => Math.round((parseInt(colour.slice(at, at + 2), 16) + 255) / 2).toString(16).padStart(2, "0")).join("")}`;
}

function figureSection(figure) {
  return el("section", { id: figure.name, class: "block figure" }, el("h2", {}, figure.title),
    el("div", { class: "panels" }, ...figure.panels.map((panel) => chart(completed(panel), figure.title))),
    ...figure.pictures.map((picture) => el("figure", {}, el("div", { class: "scroll" }, el("img", { src: picture.src, alt: picture.alt, loading: "lazy" })),
      el("figcaption", {}, picture.alt))));
}

// The panel with all fields of its marks: the data has no empty ones. beside: the text written at the mark; none for bars,
// whose names are on the axis.
function completed(panel) {
  const empty = { low: null, high: null, size: null, text: "", records: [], facts: [] };
  const complete = (mark) => ({ ...empty, beside: panel.x.scale === "names" ? "" : mark.text, ...mark });
  return { ...panel, series: panel.series.map((series) => ({ ...series, marks: series.marks.map(complete) })) };
}

// A panel as a <figure>: keys that switch series off and on, and the plot.
function chart(data, title) {
  const off = new Set(); // labels of the series that are switched off
  const tip = el("div", { class: "tip", hidden: true, role: "status" });
  const plot = el("div", { class: "plot" });
  const repaint = [() => redraw()];
  DARK.addEventListener("change", () => repaint.forEach((again) => again()));
  const keys = el("div", { class: "keys" }, ...labelsOf(data).map(([label, series]) => {
    const key = el("button", { type: "button", "aria-pressed": "true", onclick: () => {
      if (!off.delete(label)) off.add(label);
      key.setAttribute("aria-pressed", String(!off.has(label)));
      redraw();
    } }, swatch(series), label);
    repaint.push(() => key.firstChild.replaceWith(swatch(series)));
    return key;
  }));
  let width = 0;
  function redraw() {
    tip.hidden = true;
    plot.replaceChildren(tip);
    if (!width) return;
    plot.append(drawChart(data, { width, off, tip, title }));
    plot.classList.add("drawn");
  }
  new ResizeObserver(([entry]) => {
    const next = Math.floor(entry.contentRect.width);
    if (next !== width) { width = next; redraw(); }
  }).observe(plot);
  return el("figure", { class: data.starts_row ? "chart starts" : "chart" }, data.title ? el("h3", {}, data.title) : null, keys, plot,
    el("figcaption", {}, [data.heading, data.note].filter(Boolean).join("; ")));
}

// [label, the series to show in its key] of each label; of a band and a line with one label, the line. Names on the axis
// need no key.
function labelsOf(data) {
  const found = new Map();
  for (const series of data.series) {
    const known = found.get(series.label);
    if (series.label && !(data.x.names || []).includes(series.label) && (!known || known.kind === "band")) found.set(series.label, series);
  }
  return [...found];
}

// The small picture of a series in its key.
function swatch(series) {
  return svg("svg", { width: 26, height: 12, "aria-hidden": "true" },
    ["line", "fit"].includes(series.kind) ? svg("line", { x1: 1, x2: 25, y1: 6, y2: 6, ...strokeOf(series) }) : null,
    series.kind === "fit" || isBare(series) ? null : svg("path", { d: shape(series.marker, 13, 6, 4), ...fillOf(series) }));
}

// Whether a line is drawn without its marks.
function isBare(series) {
  return series.kind === "line" && series.marks.length > MANY;
}

// The attributes of a line. Published lines are dotted, fits dashed, as in the static figures.
function strokeOf(series) {
  const kind = series.provenance === "published" ? "dotted" : series.kind === "fit" ? "dashed" : series.dash;
  const dash = { solid: null, dashed: "6 3", dashdot: "6 3 1.5 3", dotted: "1.5 3" }[kind];
  return { stroke: tone(series.colour), "stroke-width": series.kind === "fit" ? 1.5 : 2, "stroke-dasharray": dash, fill: "none" };
}

// The attributes of a mark: published ones are hollow, or pale if they are bubbles or bars.
function fillOf(series) {
  const open = series.provenance === "published";
  if (["bubbles", "bars"].includes(series.kind)) return { fill: tone(series.colour), "fill-opacity": open ? 0.45 : 0.85, stroke: tone(series.colour), "stroke-width": 1.2 };
  return { fill: open ? "var(--ground)" : tone(series.colour), stroke: tone(series.colour), "stroke-width": 1.6 };
}

// The path of a mark. marker: matplotlib's letter, as in the static figures; any other than these is a circle.
function shape(marker, x, y, r) {
  const corners = {
    s: [[-1, -1], [1, -1], [1, 1], [-1, 1]], D: [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]], "^": [[0, -1.2], [1.15, 0.9], [-1.15, 0.9]],
    v: [[0, 1.2], [1.15, -0.9], [-1.15, -0.9]],
    P: [[-0.4, -1.2], [0.4, -1.2], [0.4, -0.4], [1.2, -0.4], [1.2, 0.4], [0.4, 0.4], [0.4, 1.2], [-0.4, 1.2], [-0.4, 0.4], [-1.2, 0.4], [-1.2, -0.4], [-0.4, -0.4]],
    X: [[-1.2, -0.7], [-0.7, -1.2], [0, -0.5], [0.7, -1.2], [1.2, -0.7], [0.5, 0], [1.2, 0.7], [0.7, 1.2], [0, 0.5], [-0.7, 1.2], [-1.2, 0.7], [-0.5, 0]],
  }[marker];
  if (!corners) return `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`;
  return `M${corners.map(([a, b]) => `${(x + a * r).toFixed(1)} ${(y + b * r).toFixed(1)}`).join("L")}z`;
}

// A scale from the pixels `from` to `to`: pixel(value), ticks [[value, text]] and takes(value), whether it can show a value.
function scaleOf(axis, values, from, to) {
  const log = axis.scale === "log";
  const usable = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
  let only = null; // the value, if all are equal
  let [low, high] = usable.length ? [Math.min(...usable), Math.max(...usable)] : [1, 10];
  if (axis.scale === "names") [low, high] = [-0.6, axis.names.length - 0.4];
  else if (log) {
    const room = Math.max((high / low) ** 0.06, 1.15);
    [low, high] = [low / room, high * room];
  } else {
    if (high === low && !axis.zero) only = high;
    const room = (high - low) * 0.07 || Math.abs(high) * 0.1 || 1;
    [low, high] = [axis.zero ? Math.min(0, low) : low - room, high + room];
  }
  const place = log ? Math.log : (value) => value;
  const [a, b] = [place(low), place(high)];
  const pixel = (value) => from + ((place(value) - a) / (b - a)) * (to - from);
  const room = Math.abs(to - from);
  const ticks = axis.scale === "names" ? axis.names.map((name, index) => [index, name])
    : only !== null ? [[only, short(only)]] : (log ? logTicks(low, high, room) : linearTicks(low, high, room)).map((value) => [value, short(value)]);
  return { pixel, ticks, takes: (value) => Number.isFinite(value) && (!log || value > 0) };
}

// Ticks at multiples of powers of ten, for an axis `room` pixels long; the digits are fewer if the axis has more decades.
function logTicks(low, high, room) {
  const decades = Math.log10(high / low);
  const digits = decades < 0.7 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : decades < 3 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const digit of digits) {
      const value = Number(`${digit}e${power}`);
      if (value >= low && value <= high) found.push(value);
    }
  }
  if (found.length < 2) return linearTicks(low, high, room);
  const widest = Math.max(...found.map((value) => short(value).length));
  const every = Math.ceil(found.length / Math.max(2, room / (16 + 7 * widest)));
  return found.filter((_, index) => index % every === 0);
}

// Ticks about 70 pixels apart, at multiples of 1, 2 or 5 times a power of ten.
function linearTicks(low, high, room) {
  const rough = (high - low) / Math.max(2, room / 70);
  if (!(rough > 0)) return [low];
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
  const found = [];
  for (let index = Math.ceil(low / step); index * step <= high; index += 1) found.push(Number((index * step).toPrecision(12)));
  return found;
}

// The SVG of a panel. off: labels of series that are not drawn. tip: the element for tips.
function drawChart(data, { width, off, tip, title }) {
  const named = data.x.scale === "names"; // horizontal bars, so that names can be read
  const texts = titleLines(data, width, named);
  const height = named ? data.x.names.length * 26 + 34 + 16 * texts.length : Math.round(Math.min(440, Math.max(300, width * 0.62))) + 16 * (texts.length - 1);
  const left = named ? Math.min(width * 0.45, 14 + 6.6 * Math.max(...data.x.names.map((name) => name.length))) : 62;
  const sized = named && data.series.some((series) => series.marks.some((mark) => mark.size)); // bubbles beside the bars
  const box = { left, right: width - (sized ? 40 : 14), top: 12, bottom: height - 34 - 16 * texts.length };
  const all = data.series.flatMap((series) => series.marks);
  const ends = all.flatMap((mark) => [mark.y, mark.low ?? mark.y, mark.high ?? mark.y]);
  const [across, down] = named
    ? [scaleOf({ ...data.y, zero: true }, ends, box.left, box.right), scaleOf(data.x, [], box.top, box.bottom)]
    : [scaleOf(data.x, all.map((mark) => mark.x), box.left, box.right), scaleOf(data.y, ends, box.bottom, box.top)];
  const [xs, ys] = named ? [down, across] : [across, down]; // of a mark's x and y
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${title}: ${data.y.text} against ${data.x.text}` },
    axes({ across, down, box, named, below: texts, beside: named ? "" : data.y.text }));
  const place = (x, y) => (named ? [ys.pixel(y), xs.pixel(x)] : [xs.pixel(x), ys.pixel(y)]);
  const path = (points) => `M${points.map((point) => point.map((one) => one.toFixed(1)).join(" ")).join("L")}`;
  const marks = [];
  for (const series of data.series.filter((each) => !off.has(each.label))) {
    const usable = series.marks.filter((mark) => xs.takes(mark.x) && ys.takes(mark.y));
    if (series.kind === "band") {
      const edge = (side) => usable.filter((mark) => mark[side] !== null && ys.takes(mark[side])).map((mark) => place(mark.x, mark[side]));
      const rim = [...edge("high"), ...edge("low").reverse()];
      if (rim.length) root.append(svg("path", { d: `${path(rim)}z`, fill: tone(series.colour), opacity: 0.15 }));
      continue;
    }
    if (["line", "fit"].includes(series.kind) && usable.length) {
      root.append(svg("path", { d: path(usable.map((mark) => place(mark.x, mark.y))), "stroke-linejoin": "round", ...strokeOf(series) }));
    }
    if (series.kind === "fit") continue;
    const bare = isBare(series);
    for (const mark of usable) {
      const [x, y] = place(mark.x, mark.y);
      marks.push({ series, mark, x, y, bare, ring: 8 });
    }
  }
  const largest = Math.max(...marks.map(({ mark }) => mark.size ?? 0), 0);
  marks.filter((each) => !each.bare).forEach((each) => drawMark(each, { root, place, zero: box.left, bubbleX: box.right + 22, largest, takes: ys.takes }));
  placeTexts(root, marks.filter((each) => !each.bare), box);
  listen(root, marks, tip, width);
  return root;
}

// The title of the horizontal axis, in as many lines as the width requires.
function titleLines(data, width, named) {
  const lines = [""];
  for (const word of (named ? data.y.text : data.x.text).split(" ")) {
    if (lines.at(-1) && (lines.at(-1).length + word.length) * 6.4 > width - 30) lines.push(word);
    else lines.push(`${lines.pop()} ${word}`.trim());
  }
  return lines;
}

// Frame, grid lines, ticks and titles. across, down: scales of the horizontal and the vertical axis. below: lines of the title
// of the horizontal one. beside: title of the vertical one. named: whether the chart has horizontal bars.
function axes({ across, down, box, named, below, beside }) {
  const group = svg("g", { class: "axes" });
  for (const [value, text] of down.ticks) {
    const y = down.pixel(value);
    if (!named) group.append(svg("line", { x1: box.left, x2: box.right, y1: y, y2: y }));
    const room = Math.floor((box.left - 14) / 6.6);
    const shown = text.length > room ? `${text.slice(0, room - 1)}\u2026` : text;
    group.append(svg("text", { x: box.left - 7, y: y + 4, "text-anchor": "end" }, shown, svg("title", {}, text)));
  }
  for (const [value, text] of across.ticks) {
    const x = across.pixel(value);
    const inside = Math.min(x, box.right + 14 - text.length * 3.6); // moved left if it would be cut off
    group.append(svg("line", { x1: x, x2: x, y1: box.top, y2: box.bottom }), svg("text", { x: inside, y: box.bottom + 17, "text-anchor": "middle" }, text));
  }
  group.append(svg("path", { class: "frame", d: `M${box.left} ${box.top}V${box.bottom}H${box.right}` }),
    ...below.map((text, index) => svg("text", { class: "title", x: box.right, y: box.bottom + 38 + 16 * index, "text-anchor": "end" }, text)),
    svg("text", { class: "title", x: 14, y: box.top, "text-anchor": "end", transform: `rotate(-90 14 ${box.top})` }, beside));
  return group;
}

// zero: pixel at which bars begin. bubbleX: of the bubbles beside bars. takes: whether the scale of y can show a value.
// Adds to `each` its element and the radius of the ring around it.
function drawMark(each, { root, place, zero, bubbleX, largest, takes }) {
  const { series, mark, x, y } = each;
  const bar = series.kind === "bars";
  const group = svg("g", { class: "mark", tabindex: "-1", role: "button", "aria-label": labelOf(each) });
  if (bar) group.append(svg("rect", { x: Math.min(x, zero), width: Math.abs(x - zero), y: y - 8, height: 16, ...fillOf(series) }));
  if (mark.low !== null && mark.high !== null && takes(mark.low)) {
    const [[x1, y1], [x2, y2]] = [place(mark.x, mark.low), place(mark.x, mark.high)];
    group.append(svg("line", { x1, x2, y1, y2, stroke: bar ? "var(--ink)" : tone(series.colour), "stroke-width": 1.6 }));
  }
  const r = series.kind === "bubbles" && largest ? Math.max(4, 22 * Math.sqrt((mark.size ?? 0) / largest)) : 4.2;
  if (bar && mark.size) group.append(svg("circle", { cx: bubbleX, cy: y, r: Math.max(1.5, 11 * Math.sqrt(mark.size / largest)), ...fillOf(series) }));
  if (!bar) group.append(svg("path", { d: shape(series.kind === "bubbles" ? "o" : series.marker, x, y, r), ...fillOf(series) }));
  each.group = group;
  each.ring = r + 4;
  root.append(group);
}

// Texts of marks, where they cover neither marks nor other texts.
function placeTexts(root, marks, box) {
  const taken = marks.map(({ x, y, ring }) => [x - ring, y - ring, x + ring, y + ring]);
  for (const { mark, x, y, ring } of marks.filter((each) => each.mark.beside)) {
    const [wide, high] = [mark.beside.length * 6.1, 12];
    const places = [[x + ring, y - high / 2], [x - ring - wide, y - high / 2], [x - wide / 2, y - ring - high], [x - wide / 2, y + ring]];
    const free = places.map(([left, top]) => [left, top, left + wide, top + high]).find(([left, top, right, bottom]) =>
      left >= box.left && right <= box.right && top >= box.top && bottom <= box.bottom &&
      taken.every((other) => left >= other[2] || right <= other[0] || top >= other[3] || bottom <= other[1]));
    if (!free) continue;
    taken.push(free);
    root.append(svg("text", { class: "beside", x: free[0], y: free[3] - 2 }, mark.beside));
  }
}

// "dit-b-4: 3.27 [3.21, 3.33]".
function labelOf({ series, mark }) {
  const value = mark.low === null ? short(mark.y) : `${short(mark.y)} [${short(mark.low)}, ${short(mark.high)}]`;
  return `${series.label || mark.text}: ${value}`;
}

// Shows the tip of the mark near the pointer or with the focus; a click, Enter or space pins a mark.
function listen(root, marks, tip, width) {
  if (!marks.length) return;
  const drawn = marks.filter((each) => each.group);
  drawn[0]?.group.setAttribute("tabindex", "0"); // one stop of the tab key; the arrow keys move on from there
  const show = (each) => showTip(each, tip, width);
  const hide = () => { tip.hidden = true; };
  const nearest = (event) => {
    const frame = root.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
    // To a bar, from anywhere beside it; to other marks, from their centre.
    const distance = (each) => Math.hypot(each.series.kind === "bars" ? Math.max(0, x - each.x) : each.x - x, each.y - y);
    const found = marks.reduce((best, each) => (distance(each) < distance(best) ? each : best));
    return distance(found) <= NEAR ? found : null;
  };
  const ring = (each) => root.append(svg("circle", { class: "pin", cx: each.x, cy: each.y, r: each.ring }));
  const pin = (each) => {
    clearPins();
    pinned = each.mark;
    ring(each);
    showRecords(each.mark.records);
  };
  marks.filter(({ mark }) => mark === pinned).forEach(ring);
  root.addEventListener("pointermove", (event) => { const each = nearest(event); if (each) show(each); else hide(); });
  root.addEventListener("pointerleave", hide);
  root.addEventListener("click", (event) => { const each = nearest(event); if (each) pin(each); });
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  drawn.forEach((each, index) => {
    each.group.addEventListener("focus", () => show(each));
    each.group.addEventListener("blur", hide);
    each.group.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pin(each); }
      if (!(event.key in step)) return;
      event.preventDefault();
      const next = drawn[(index + step[event.key] + drawn.length) % drawn.length];
      each.group.setAttribute("tabindex", "-1");
      next.group.setAttribute("tabindex", "0");
      next.group.focus();
    });
  });
}

// Fills and places the tip of a mark: the description of its record, or mean and number of several records.
function showTip({ series, mark, x, y }, tip, width) {
  const records = mark.records.map(recordOf).filter(Boolean);
  const [record] = records;
  const lines = [];
  if (records.length === 1) {
    lines.push([`${record.metric} `, el("strong", {}, ...valueParts(record.text))]);
    const sampled = record.sampling_steps === null ? [] : [`${record.sampler}, ${record.sampling_steps} sampling steps, guidance ${record.guidance}`];
    const trained = record.steps === null ? "" : `${record.steps_text} training steps${record.seed === null ? "" : `, seed ${record.seed}`}`;
    lines.push(...[trained, ...sampled, `N = ${record.n.toLocaleString("en")}`].filter(Boolean).map((text) => [text]));
    lines.push([record.published ? `published, ${record.where}` : `measured, record ${record.id.slice(0, 12)}`]);
  } else {
    lines.push([labelOf({ series, mark })]);
    if (mark.records.length > 1) lines.push([`mean of ${mark.records.length} records`]);
    lines.push([series.provenance]);
  }
  lines.push(...mark.facts.map(([name, text]) => [`${name} ${text}`]));
  tip.replaceChildren(el("b", {}, records.length === 1 ? record.system : series.label || mark.text), ...lines.map((parts) => el("div", {}, ...parts)));
  tip.hidden = false;
  const left = Math.max(0, Math.min(x + 14, width - tip.offsetWidth - 4));
  const above = y - tip.offsetHeight - 14;
  tip.style.left = `${left}px`;
  tip.style.top = `${above >= 0 ? above : y + 16}px`;
}
