/* ---------------------------------------------------------------- maps */

const rows = data.scatter.rows;
const SHAPES = ["●", "■", "▲", "◆", "✚"];
const MARGIN = 14;
const MOST_ZOOM = 64;
const EXAMPLE = 40; // side of the example image of a group
const counted = (number) => number.toLocaleString("en");
const state = { by: "cluster", only: new Set(), point: null };
/* Clusters with the same name are one group: the first of them. */
const group = (index) => {
  const number = data.images[rows[index]][state.by];
  return state.by === "label" ? number : data.groups[number];
};
const groupName = (number) => (state.by === "label" ? data.class_names : data.group_names)[number];
const shown = (index) => state.only.size === 0 || state.only.has(group(index));
const maps = [...document.querySelectorAll("canvas")].map((canvas) => ({
  canvas,
  tip: canvas.nextElementSibling,
  tools: canvas.closest("figure").querySelector(".tools"),
  points: data.scatter.points[canvas.dataset.stage].map(([x, y]) => [x, 1 - y]),
  zoom: 1,
  middle: [0.5, 0.5], // of the view
  pictures: null, // whether images take the place of points; null: when zoomed in
  cells: [], // the images drawn: index, place and side
  region: null, // two corners of the selection, as parts of the map
  start: null, // where a drag began
  peaks: { key: null, found: [] },
}));

/* Pixels per side of the whole map. */
const scaleOf = (map) => (map.canvas.clientWidth - 2 * MARGIN) * map.zoom;
const hasPictures = (map) => map.pictures ?? map.zoom > 1;

function toScreen(map, point) {
  const side = map.canvas.clientWidth;
  return point.map((value, axis) => side / 2 + (value - map.middle[axis]) * scaleOf(map));
}

function toMap(map, place) {
  const side = map.canvas.clientWidth;
  return place.map((value, axis) => map.middle[axis] + (value - side / 2) / scaleOf(map));
}

const at = (map, index) => toScreen(map, map.points[index]);

function inView(map, index) {
  return at(map, index).every((value) => value >= 0 && value <= map.canvas.clientWidth);
}

/* Zoom such that one place of the map stays where it is on the screen. */
function zoom(map, factor, still = map.middle) {
  const former = map.zoom;
  map.zoom = Math.min(Math.max(map.zoom * factor, 1), MOST_ZOOM);
  look(map, still.map((value, axis) => value + ((map.middle[axis] - value) * former) / map.zoom));
}

function look(map, middle) {
  const half = 0.5 / map.zoom;
  map.middle = middle.map((value) => Math.min(Math.max(value, half), 1 - half));
  tools(map);
  draw(map);
}

/* ------------------------------------------------------------- drawing */

const sheets = new Map();

/* A sheet of thumbnails as an image, once it is decoded: it is only drawn from where needed. */
function sheetOf(number) {
  if (!sheets.has(number)) {
    const probe = document.createElement("span");
    probe.className = `pic s${number}`;
    document.body.append(probe);
    const style = getComputedStyle(probe);
    const sheet = { image: new Image(), ready: false };
    sheet.columns = Number(style.getPropertyValue("--c"));
    sheet.image.src = style.backgroundImage.slice(5, -2);
    probe.remove();
    sheet.image.decode().then(() => {
      sheet.ready = true;
      redraw();
    });
    sheets.set(number, sheet);
  }
  return sheets.get(number);
}

function drawPicture(pen, index, x, y, side) {
  const place = data.places[rows[index]];
  if (!place) return; // an embedding without a picture
  pen.fillStyle = data.colors[group(index)];
  pen.fillRect(x, y, side, side);
  const { image, ready, columns } = sheetOf(place[0]);
  if (!ready) return;
  const own = image.naturalWidth / columns;
  pen.imageSmoothingEnabled = own > 16; // as the page shows tiny images
  pen.drawImage(image, place[1] * own, place[2] * own, own, own, x + 2, y + 2, side - 4, side - 4);
}

/* One image in each cell of a grid, the one nearest to its middle, so that none covers another. */
function cellsOf(map) {
  const visible = rows.map((_, index) => index).filter((i) => shown(i) && inView(map, i));
  const side = visible.length > 80 ? 44 : 64;
  const cell = side / scaleOf(map);
  const best = new Map();
  for (const index of visible) {
    const place = map.points[index].map((value) => Math.floor(value / cell));
    const away = Math.hypot(...map.points[index].map((v, axis) => v / cell - place[axis] - 0.5));
    const key = place.join();
    if (!best.has(key) || away < best.get(key).away) best.set(key, { index, place, away });
  }
  return [...best.values()].map(({ index, place }) => {
    const [x, y] = toScreen(map, place.map((value) => value * cell));
    return { index, x, y, side };
  });
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
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.height = Math.round(side * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const style = getComputedStyle(document.body);
  const [ink, paper, faint] = ["--ink", "--panel", "--line"].map((name) => style.getPropertyValue(name));
  for (const front of [false, true]) {
    rows.forEach((_, index) => {
      if (shown(index) !== front || !inView(map, index)) return;
      const number = group(index);
      pen.fillStyle = front ? data.colors[number] : faint;
      shape(pen, front ? number % SHAPES.length : 0, ...at(map, index), front ? 2.6 : 1.2);
    });
  }
  map.cells = hasPictures(map) ? cellsOf(map) : [];
  for (const cell of map.cells) drawPicture(pen, cell.index, cell.x, cell.y, cell.side);
  write(pen, map, ink, paper);
  pen.lineWidth = 2;
  pen.strokeStyle = ink;
  if (map.region) {
    const [from, to] = map.region.map((corner) => toScreen(map, corner));
    pen.setLineDash([5, 3]);
    pen.strokeRect(from[0], from[1], to[0] - from[0], to[1] - from[1]);
    pen.setLineDash([]);
  }
  if (state.point === null || !shown(state.point)) return;
  const cell = map.cells.find(({ index }) => index === state.point);
  if (cell) return void pen.strokeRect(cell.x, cell.y, cell.side, cell.side);
  pen.beginPath();
  pen.arc(...at(map, state.point), 7, 0, 7);
  pen.stroke();
}

/* Where each group in view is densest, the largest group first. */
function peaksOf(map) {
  const key = [state.by, ...state.only, map.zoom, ...map.middle].join();
  if (map.peaks.key === key) return map.peaks.found;
  const groups = new Map();
  rows.forEach((_, index) => {
    if (!shown(index) || !inView(map, index)) return;
    if (!groups.has(group(index))) groups.set(group(index), []);
    groups.get(group(index)).push(index);
  });
  const radius = 0.05 / map.zoom;
  const found = [...groups].sort((a, b) => b[1].length - a[1].length).map(([number, members]) => {
    let best = members[0];
    let most = -1;
    for (const index of members) {
      const [x, y] = map.points[index];
      let near = 0;
      for (const other of members) {
        const [u, v] = map.points[other];
        near += Math.max(0, 1 - Math.hypot(u - x, v - y) / radius);
      }
      if (near > most) [best, most] = [index, near];
    }
    return { number, index: best };
  });
  map.peaks = { key, found };
  return found;
}

/* The name of each group where it is densest, with an image from there; the largest come first. */
function write(pen, map, ink, paper) {
  pen.font = "700 13px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  const side = map.canvas.clientWidth;
  const example = hasPictures(map) || !data.places[rows[0]] ? 0 : EXAMPLE;
  const taken = [];
  for (const { number, index } of peaksOf(map)) {
    let text = groupName(number).replace(/^cluster (\d+)$/, "$1");
    if (text.length > 24) text = `${text.slice(0, 23)}…`;
    const width = Math.max(pen.measureText(text).width + 8, example + 4);
    const height = 18 + example;
    const [px, py] = at(map, index);
    const x = Math.min(Math.max(px, width / 2), side - width / 2);
    const places = [0, -1, 1, -2, 2].map((step) => py + step * height);
    const y = places.find((middle) => middle >= height / 2 && middle <= side - height / 2 && taken
      .every((b) => Math.abs(b.x - x) * 2 >= b.width + width || Math.abs(b.y - middle) * 2 >= b.height + height));
    if (y === undefined) continue; // it is written when there is room: zoomed in
    taken.push({ x, y, width, height });
    if (example) drawPicture(pen, index, x - example / 2, y - height / 2, example);
    const wide = pen.measureText(text).width + 6;
    pen.globalAlpha = 0.85;
    pen.fillStyle = paper;
    pen.fillRect(x - wide / 2, y + example / 2 - 9, wide, 18);
    pen.globalAlpha = 1;
    pen.fillStyle = ink;
    pen.fillText(text, x, y + example / 2);
  }
}

const redraw = () => maps.forEach(draw);

/* ------------------------------------------------------------ pointing */

function select(map, index) {
  state.point = index;
  for (const other of maps) other.tip.hidden = other !== map || index === null;
  if (index !== null && !inView(map, index)) look(map, map.points[index]);
  redraw();
  if (index === null) return;
  const [x, y] = at(map, index);
  const name = document.createElement("strong");
  name.textContent = data.images[rows[index]].id;
  const lines = document.createElement("div");
  lines.textContent = facts(rows[index]).join("; ");
  map.tip.replaceChildren(picture(rows[index]), name, lines);
  const side = map.canvas.clientWidth;
  map.tip.style.left = `${Math.max(0, Math.min(x > side / 2 ? x - 180 : x + 34, side - 146))}px`;
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

/* The image at a place of the screen: the one drawn there, or the nearest point. */
function pointed(map, x, y) {
  const cell = map.cells.find((c) => x >= c.x && x < c.x + c.side && y >= c.y && y < c.y + c.side);
  if (cell) return cell.index;
  const reach = (dx, dy) => (Math.hypot(dx, dy) < 16 ? Math.hypot(dx, dy) : Infinity);
  return nearest(map, x, y, reach);
}

/* ------------------------------------------------------------ selecting */

function selected(map) {
  if (!map.region) return [];
  const [[x0, y0], [x1, y1]] = map.region;
  const between = (value, a, b) => value >= Math.min(a, b) && value <= Math.max(a, b);
  return rows.map((_, index) => index).filter((index) => {
    const [x, y] = map.points[index];
    return shown(index) && between(x, x0, x1) && between(y, y0, y1);
  });
}

function mark(map, region) {
  map.region = region;
  tools(map);
  draw(map);
}

/* Buttons and words follow the state of the map. */
function tools(map) {
  const number = selected(map).length;
  const button = (name) => map.tools.querySelector(`[data-do=${name}]`);
  button("clear").disabled = button("closer").disabled = !map.region;
  button("download").disabled = number === 0;
  button("out").disabled = button("all").disabled = map.zoom === 1;
  button("in").disabled = map.zoom === MOST_ZOOM;
  button("pictures")?.setAttribute("aria-pressed", String(hasPictures(map)));
  const sampled = rows.length < data.total ? `; the run has ${counted(data.total)}` : "";
  map.tools.querySelector("[role=status]").textContent = map.region
    ? `${counted(number)} selected, of ${counted(rows.length)} on the map${sampled}`
    : "";
}

const cell = (value) => (/[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);

function download(map) {
  const lines = selected(map).map((index) => {
    const image = data.images[rows[index]];
    return `${cell(image.exact ?? image.id)},${image.cluster},${image.confidence}\n`;
  });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(["id,cluster,confidence\n", ...lines], { type: "text/csv" }));
  link.download = "selected.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const DOES = {
  in: (map) => zoom(map, 2),
  out: (map) => zoom(map, 0.5),
  all: (map) => zoom(map, 0),
  pictures(map) {
    map.pictures = !hasPictures(map);
    tools(map);
    draw(map);
  },
  view(map) {
    const side = map.canvas.clientWidth;
    mark(map, [toMap(map, [0, 0]), toMap(map, [side, side])]);
  },
  clear: (map) => mark(map, null),
  closer(map) {
    const [from, to] = map.region;
    const size = Math.max(...from.map((value, axis) => Math.abs(to[axis] - value)), 1 / MOST_ZOOM);
    map.zoom = Math.min(Math.max(1 / size, 1), MOST_ZOOM);
    look(map, from.map((value, axis) => (value + to[axis]) / 2));
  },
  download,
};

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const ZOOMS = { "+": 2, "=": 2, "-": 0.5, 0: 0 };

function key(map, event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return undefined;
  if (event.key === "Escape") return map.region ? mark(map, null) : select(map, null);
  const point = state.point !== null && shown(state.point) ? state.point : null;
  const opens = event.key === "Enter" && point !== null;
  if (!opens && !(event.key in ARROWS) && !(event.key in ZOOMS)) return undefined;
  event.preventDefault(); // or Enter would also press the button that gets the focus
  if (opens) return enlarge(rows[point]);
  if (event.key in ZOOMS) {
    return zoom(map, ZOOMS[event.key], point === null ? map.middle : map.points[point]);
  }
  const [dx, dy] = ARROWS[event.key];
  if (event.shiftKey) {
    const [from, to] = map.region ?? Array(2).fill(point === null ? map.middle : map.points[point]);
    const step = 0.05 / map.zoom;
    return mark(map, [from, [to[0] + dx * step, to[1] + dy * step]]);
  }
  const side = map.canvas.clientWidth;
  if (point === null) return select(map, nearest(map, side / 2, side / 2, Math.hypot));
  /* The nearest one in that quarter of the plane. */
  const next = nearest(map, ...at(map, point), (x, y, index) => {
    const ahead = x * dx + y * dy;
    const aside = Math.abs(x * dy) + Math.abs(y * dx);
    return index === point || ahead <= 0 || aside > ahead ? Infinity : Math.hypot(x, y);
  });
  return next === null ? undefined : select(map, next);
}

for (const map of maps) {
  const place = (event) => {
    const box = map.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const point = (event) => select(map, pointed(map, ...place(event)));
  map.canvas.addEventListener("pointerdown", (event) => {
    point(event);
    if (event.pointerType === "touch" || event.button !== 0) return; // a finger scrolls the page
    map.start = place(event);
    map.canvas.setPointerCapture(event.pointerId);
  });
  map.canvas.addEventListener("pointermove", (event) => {
    const here = place(event);
    if (!map.start) return point(event);
    if (map.start.every((value, axis) => Math.abs(here[axis] - value) < 5)) return undefined;
    map.tip.hidden = true;
    return mark(map, [toMap(map, map.start), toMap(map, here)]);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    map.canvas.addEventListener(end, () => (map.start = null));
  }
  map.canvas.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "touch") select(map, null); // a finger leaves when it is lifted
  });
  map.canvas.addEventListener("dblclick", (event) => zoom(map, 2, toMap(map, place(event))));
  map.canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== map.canvas) return; // the page scrolls
    event.preventDefault();
    zoom(map, event.deltaY < 0 ? 1.25 : 0.8, toMap(map, place(event)));
  }, { passive: false });
  map.canvas.addEventListener("blur", () => (map.tip.hidden = true));
  map.canvas.addEventListener("keydown", (event) => key(map, event));
  map.tools.addEventListener("click", (event) => DOES[event.target.dataset.do]?.(map));
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
    button.append(sign, ` ${groupName(number)}`);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      const on = !state.only.delete(number);
      if (on) state.only.add(number);
      button.setAttribute("aria-pressed", String(on));
      refresh();
    });
    return button;
  });
  byId("legend").replaceChildren(...entries);
}

function count() {
  const number = rows.filter((_, index) => shown(index)).length;
  byId("shown").textContent = `${counted(number)} of ${counted(rows.length)} points shown`;
}

/* After a change of what is shown. */
function refresh() {
  count();
  maps.forEach(tools);
  redraw();
}

for (const choice of document.querySelectorAll("input[name=by]")) {
  choice.addEventListener("change", () => {
    state.by = choice.value;
    state.only.clear();
    legend();
    refresh();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
legend();
refresh();
