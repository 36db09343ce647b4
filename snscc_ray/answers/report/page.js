"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const percent = (share) => (share === 1 || share < 0.995 ? Math.round(share * 100) + "%" : "99%+");

/* ---------------------------------------------------------------- images */

function picture(row) {
  const span = document.createElement("span");
  if (!(row in data.places)) return span; // an embedding without a picture
  const [sheet, column, line] = data.places[row];
  span.className = `pic s${sheet}`;
  span.style.setProperty("--x", column);
  span.style.setProperty("--y", line);
  return span;
}

function facts(row) {
  const image = data.images[row];
  const found = [`${data.labels[image.cluster]}, ${percent(image.confidence)} confident`];
  if (image.second_confidence >= 0.005) {
    found.push(`else ${data.labels[image.second]} (${percent(image.second_confidence)})`);
  }
  if (data.class_names) found.push(`label: ${data.class_names[image.label]}`);
  return found;
}

/* Ids are only ever set as text. */
function enlarge(row) {
  byId("large-pic").replaceChildren(picture(row));
  byId("large-id").textContent = data.images[row].id;
  byId("large-facts").replaceChildren(
    ...facts(row).map((text) => {
      const item = document.createElement("li");
      item.textContent = text;
      return item;
    }),
  );
  byId("large").showModal();
}

document.addEventListener("click", (event) => {
  const thumb = event.target.closest(".thumb");
  if (thumb) enlarge(thumb.dataset.row);
  if (event.target === byId("large")) byId("large").close(); // its backdrop
});
byId("large-close").addEventListener("click", () => byId("large").close());

byId("filter").addEventListener("change", (event) => {
  for (const part of document.querySelectorAll("[data-cluster]")) {
    part.hidden = event.target.value !== "" && part.dataset.cluster !== event.target.value;
  }
});

/* ---------------------------------------------------------------- maps */

const rows = data.scatter.rows;
const SHAPES = ["●", "■", "▲", "◆", "✚"];
const NUMBERED = 30; // groups whose numbers are written into a map
const state = { by: "cluster", only: new Set(), point: null };
/* Clusters with the same name are one group: the first of them. */
const group = (index) => {
  const number = data.images[rows[index]][state.by];
  return state.by === "label" ? number : data.groups[number];
};
const labelOf = (number) => (state.by === "label" ? data.class_names : data.labels)[number];
const shown = (index) => state.only.size === 0 || state.only.has(group(index));
const maps = [...document.querySelectorAll("canvas")].map((canvas) => ({
  canvas,
  tip: canvas.nextElementSibling,
  points: data.scatter.points[canvas.dataset.stage],
}));

function at(map, index) {
  const side = map.canvas.clientWidth;
  const margin = 14;
  const [x, y] = map.points[index];
  return [margin + x * (side - 2 * margin), margin + (1 - y) * (side - 2 * margin)];
}

/* The corners of each shape but the first, in radii from its middle. */
const CORNERS = [
  [],
  [[-1, -1], [1, -1], [1, 1], [-1, 1]],
  [[0, -1.3], [1.2, 1], [-1.2, 1]],
  [[0, -1.4], [1.4, 0], [0, 1.4], [-1.4, 0]],
  [[-0.5, -1.3], [0.5, -1.3], [0.5, -0.5], [1.3, -0.5], [1.3, 0.5], [0.5, 0.5],
   [0.5, 1.3], [-0.5, 1.3], [-0.5, 0.5], [-1.3, 0.5], [-1.3, -0.5], [-0.5, -0.5]],
];

function shape(pen, kind, x, y, r) {
  pen.beginPath();
  if (kind === 0) pen.arc(x, y, r, 0, 7);
  for (const [dx, dy] of CORNERS[kind]) pen.lineTo(x + dx * r, y + dy * r);
  pen.fill();
}

function draw(map) {
  const { canvas } = map;
  const side = canvas.clientWidth;
  const scale = window.devicePixelRatio || 1;
  canvas.width = canvas.height = Math.round(side * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const style = getComputedStyle(document.body);
  const [ink, paper, faint] = ["--ink", "--panel", "--line"].map((name) => style.getPropertyValue(name));
  for (const front of [false, true]) {
    rows.forEach((_, index) => {
      if (shown(index) !== front) return;
      const number = group(index);
      pen.fillStyle = front ? data.colors[number] : faint;
      shape(pen, front ? number % SHAPES.length : 0, ...at(map, index), front ? 2.6 : 1.2);
    });
  }
  write(pen, map, ink, paper);
  if (state.point !== null) {
    pen.beginPath();
    pen.arc(...at(map, state.point), 8, 0, 7);
    pen.lineWidth = 3;
    pen.strokeStyle = ink;
    pen.stroke();
  }
}

/* The number of each group where the middle one of its points is. */
function write(pen, map, ink, paper) {
  const groups = new Map();
  rows.forEach((_, index) => {
    if (!shown(index)) return;
    if (!groups.has(group(index))) groups.set(group(index), []);
    groups.get(group(index)).push(index);
  });
  if (groups.size > NUMBERED) return;
  pen.font = "700 13px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineWidth = 4;
  const middle = (values) => values.sort((a, b) => a - b)[values.length >> 1];
  for (const [number, members] of groups) {
    const places = members.map((index) => at(map, index));
    const x = middle(places.map((place) => place[0]));
    const y = middle(places.map((place) => place[1]));
    const text = labelOf(number).replace(/^cluster /, "");
    pen.strokeStyle = paper;
    pen.strokeText(text, x, y);
    pen.fillStyle = ink;
    pen.fillText(text, x, y);
  }
}

const redraw = () => maps.forEach(draw);

function select(map, index) {
  state.point = index;
  for (const other of maps) other.tip.hidden = other !== map || index === null;
  redraw();
  if (index === null) return;
  const [x, y] = at(map, index);
  const name = document.createElement("strong");
  name.textContent = data.images[rows[index]].id;
  const lines = document.createElement("div");
  lines.textContent = facts(rows[index]).join("; ");
  map.tip.replaceChildren(picture(rows[index]), name, lines);
  const side = map.canvas.clientWidth;
  map.tip.style.left = `${Math.max(0, Math.min(x > side / 2 ? x - 160 : x + 14, side - 146))}px`;
  map.tip.style.top = `${Math.max(0, y > side / 2 ? y - map.tip.offsetHeight - 12 : y + 12)}px`;
  if (document.activeElement === map.canvas) {
    byId("said").textContent = `${name.textContent}, ${lines.textContent}`;
  }
}

function nearest(map, x, y, cost) {
  let best = null;
  let least = Infinity;
  rows.forEach((_, index) => {
    if (!shown(index)) return;
    const [px, py] = at(map, index);
    const value = cost(px - x, py - y, index);
    if (value < least) [best, least] = [index, value];
  });
  return best;
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function key(map, event) {
  if (event.key === "Escape") return select(map, null);
  const opens = event.key === "Enter" && state.point !== null;
  if (!opens && !(event.key in ARROWS)) return undefined;
  event.preventDefault(); // or Enter would also press the button that gets the focus
  if (opens) return enlarge(rows[state.point]);
  const [dx, dy] = ARROWS[event.key];
  const side = map.canvas.clientWidth;
  if (state.point === null || !shown(state.point)) {
    return select(map, nearest(map, side / 2, side / 2, Math.hypot));
  }
  /* The nearest one in that quarter of the plane. */
  const next = nearest(map, ...at(map, state.point), (x, y, index) => {
    const ahead = x * dx + y * dy;
    const aside = Math.abs(x * dy) + Math.abs(y * dx);
    return index === state.point || ahead <= 0 || aside > ahead ? Infinity : Math.hypot(x, y);
  });
  return next === null ? undefined : select(map, next);
}

for (const map of maps) {
  const point = (event) => {
    const box = map.canvas.getBoundingClientRect();
    const reach = (x, y) => (Math.hypot(x, y) < 16 ? Math.hypot(x, y) : Infinity);
    select(map, nearest(map, event.clientX - box.left, event.clientY - box.top, reach));
  };
  map.canvas.addEventListener("pointermove", point);
  map.canvas.addEventListener("pointerdown", point);
  map.canvas.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "touch") select(map, null); // a finger leaves when it is lifted
  });
  map.canvas.addEventListener("blur", () => (map.tip.hidden = true));
  map.canvas.addEventListener("keydown", (event) => key(map, event));
  new ResizeObserver(() => draw(map)).observe(map.canvas);
}

function legend() {
  const sizes = new Map();
  rows.forEach((_, index) => sizes.set(group(index), (sizes.get(group(index)) || 0) + 1));
  const entries = [...sizes.keys()].sort((a, b) => a - b).map((number) => {
    const button = document.createElement("button");
    const sign = document.createElement("span");
    sign.textContent = SHAPES[number % SHAPES.length];
    sign.style.color = data.colors[number];
    sign.setAttribute("aria-hidden", "true");
    button.type = "button";
    button.append(sign, ` ${labelOf(number)}`);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      const on = !state.only.delete(number);
      if (on) state.only.add(number);
      button.setAttribute("aria-pressed", String(on));
      count();
      redraw();
    });
    return button;
  });
  byId("legend").replaceChildren(...entries);
}

function count() {
  const number = rows.filter((_, index) => shown(index)).length;
  byId("shown").textContent = `${number.toLocaleString("en")} of ${rows.length.toLocaleString("en")} points shown`;
}

for (const choice of document.querySelectorAll("input[name=by]")) {
  choice.addEventListener("change", () => {
    state.by = choice.value;
    state.only.clear();
    legend();
    count();
    redraw();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
legend();
count();
redraw();
