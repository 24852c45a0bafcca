"use strict";
// The page: what a person does becomes numbered prompts that are sent one after the other; the mask
// on screen is always one that the server made. Coordinates are pixels of the original image, where
// the pixel in column 3 and row 0 is (3, 0) and covers 2.5 to 3.5.

const $ = (id) => document.getElementById(id);
const canvas = $("view"), paint = canvas.getContext("2d");
const MASK = [0, 200, 255], DOUBT = [255, 150, 0];
const DRAG_PIXELS = 4;  // a hand shakes: less is a click

let work = null;          // what the server says of the session
let sequence = 0;         // of the next prompt
let picture = null, mask = null, doubt = null;  // bitmaps, canvases at native size
let view = {scale: 1, x: 0, y: 0};              // canvas = image * scale + (x, y)
let tool = "point", positive = true, visible = true;
let drag = null, space = false;
let cross = null, corner = null;                // keyboard: where Enter clicks, first corner of a box
const waiting = [];       // prompts that are not sent yet
let sending = false, fetching = false, stale = false;
let clickedAt = 0;

// ---------------------------------------------------------------- talking to the server

async function call(path, options) {
  const answer = await fetch(path, options);
  const data = answer.headers.get("content-type").includes("json") ? await answer.json() : await answer.blob();
  if (!answer.ok) throw new Error(data.error || `the server answered ${answer.status}`);
  return data;
}

const post = (path, body) => call(path, {
  method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
});

const address = (rest = "") => `/api/sessions/${encodeURIComponent(work.session)}${rest}`;

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

// Numbered when it is made and not when it is sent, so that no answer can reorder what a hand did.
function send(path, body) {
  if (!work || !picture) return;
  waiting.push({path, body: {sequence: sequence++, ...body}, session: work.session});
  clickedAt = performance.now();
  pump();
}

const prompt = (body) => send("/prompts", body);

async function pump() {
  if (sending) return;
  sending = true;
  while (waiting.length) {
    const {path, body, session} = waiting[0];
    if (work.session !== session) { waiting.shift(); continue; }
    try {
      const state = await post(address(path), body);
      waiting.shift();
      show(state);
      say(path === "/decision" ? `${state.decision} is noted` : "");
      if (path === "/decision") refreshQueue();
    } catch (error) {
      // A request that never arrived is sent again under its number: nothing is applied twice.
      if (error instanceof TypeError) {
        say("the server cannot be reached; trying again", true);
        await new Promise((done) => setTimeout(done, 1000));
        continue;
      }
      waiting.shift();
      say(error.message, true);
    }
    overlays();
  }
  sending = false;
  draw();
}

// One picture at a time: in a burst of clicks those in between are not asked for.
async function overlays() {
  stale = true;
  if (fetching) return;
  fetching = true;
  while (stale) {
    stale = false;
    const session = work.session, since = clickedAt;
    try {
      const found = work.mask ? await tinted("/mask", MASK) : null;
      if (work.session !== session) { stale = true; continue; }
      mask = found;
      drawNow();
      if (since && !stale && !waiting.length && since === clickedAt) {
        const server = work.latency_ms == null ? "" : `, model ${work.latency_ms.toFixed(0)} ms`;
        $("latency").textContent = `${(performance.now() - since).toFixed(0)} ms${server}`;
        clickedAt = 0;
      }
      // After the mask, which a person waits for.
      const wanted = work.mask && Number($("doubt-opacity").value) > 0 && !stale;
      const foundDoubt = wanted ? await tinted("/uncertainty", DOUBT) : null;
      if (work.session === session) doubt = foundDoubt;
    } catch (error) {
      say(error.message, true);
    }
    draw();
  }
  fetching = false;
}

// Grey becomes opacity: a canvas of one colour.
async function tinted(path, colour) {
  const bitmap = await createImageBitmap(await call(address(path)));
  const made = new OffscreenCanvas(bitmap.width, bitmap.height), pen = made.getContext("2d");
  pen.drawImage(bitmap, 0, 0);
  const pixels = pen.getImageData(0, 0, made.width, made.height), data = pixels.data;
  for (let i = 0; i < data.length; i += 4) {
    const value = data[i];
    data[i] = colour[0]; data[i + 1] = colour[1]; data[i + 2] = colour[2]; data[i + 3] = value;
  }
  pen.putImageData(pixels, 0, 0);
  return made;
}

// ---------------------------------------------------------------- cases

async function open(state) {
  work = state;
  sequence = state.next_sequence;
  mask = doubt = cross = corner = null;
  clickedAt = 0;
  location.hash = state.session;
  picture = await createImageBitmap(await call(address("/image")));
  $("hint").hidden = true;
  $("answer").textContent = "";
  $("latency").textContent = "–";
  fit();
  show(state);
  await overlays();
  refreshQueue();
}

async function openCase(name) {
  say("opening…");
  try {
    await open(await post("/api/sessions", {case: name}));
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

async function next() {
  const rows = await call("/api/queue");
  // After the one on screen, and from the beginning again: cases may have been left out.
  const at = rows.findIndex((row) => work && row.case === work.case);
  const found = [...rows.slice(at + 1), ...rows.slice(0, at + 1)].find((row) => !row.decision);
  if (found) await openCase(found.case);
  else say(rows.length ? "every case of the queue has a decision" : "the queue is empty; open a file");
}

// The ids of a record's cases end with the target.
const named = ({case: id, target}) => (!target || id.endsWith(` ${target}`) ? id : `${id}: ${target}`);

async function refreshQueue() {
  const rows = await call("/api/queue");
  $("queue").replaceChildren(...rows.map((row) => {
    const item = document.createElement("li"), button = document.createElement("button");
    const right = document.createElement("span");
    button.textContent = named(row);
    right.textContent = row.decision || (row.uncertainty == null ? "" : row.uncertainty.toFixed(2));
    button.append(right);
    button.setAttribute("aria-pressed", String(Boolean(work && work.case === row.case)));
    button.addEventListener("click", () => openCase(row.case));
    item.append(button);
    return item;
  }));
}

function show(state) {
  work = {...work, ...state};
  $("case").textContent = named(work);
  const signed = (value, digits) => (value == null ? "" : ` (${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)})`);
  const changes = state.changes || {};
  $("area").textContent = state.mask ? `${state.area} px${signed(changes.area, 0)}` : "–";
  $("dice").textContent = state.mask ? `${state.predicted_dice.toFixed(3)}${signed(changes.predicted_dice, 3)}` : "–";
  $("doubt").textContent = state.mask ? state.uncertainty.toFixed(3) : "–";
  $("undo").disabled = !state.can_undo;
  $("redo").disabled = !state.can_redo;
  for (const name of ["accept", "reject", "unsure"]) $(name).classList.toggle("chosen", state.decision === name);
  $("ask").hidden = work.answers === false;
  draw();
}

// ---------------------------------------------------------------- drawing

function fit() {
  const {width, height} = canvas.getBoundingClientRect();
  const scale = Math.min(width / picture.width, height / picture.height) * 0.96;
  view = {scale, x: (width - picture.width * scale) / 2, y: (height - picture.height * scale) / 2};
}

function zoom(factor, px, py) {
  const scale = Math.min(64, Math.max(0.02, view.scale * factor)), by = scale / view.scale;
  view = {scale, x: px - (px - view.x) * by, y: py - (py - view.y) * by};
  draw();
}

const toImage = (px, py) => [(px - view.x) / view.scale - 0.5, (py - view.y) / view.scale - 0.5];
const toCanvas = (x, y) => [(x + 0.5) * view.scale + view.x, (y + 0.5) * view.scale + view.y];
const within = ([x, y]) => x >= -0.5 && y >= -0.5 && x <= picture.width - 0.5 && y <= picture.height - 0.5;
const clamped = ([x, y]) => [Math.min(Math.max(x, 0), picture.width - 1), Math.min(Math.max(y, 0), picture.height - 1)];

let drawing = false;
function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => { drawing = false; drawNow(); });
}

function drawNow() {
  const ratio = window.devicePixelRatio || 1, size = canvas.getBoundingClientRect();
  const width = Math.round(size.width * ratio), height = Math.round(size.height * ratio);
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  paint.setTransform(ratio, 0, 0, ratio, 0, 0);
  paint.clearRect(0, 0, size.width, size.height);
  if (!picture) return;
  paint.imageSmoothingEnabled = view.scale < 1;
  const layer = (image, opacity) => {
    if (!image || !opacity) return;
    paint.globalAlpha = opacity;
    paint.drawImage(image, view.x, view.y, picture.width * view.scale, picture.height * view.scale);
    paint.globalAlpha = 1;
  };
  layer(picture, 1);
  layer(doubt, $("doubt-opacity").value / 100);
  layer(visible ? mask : null, $("mask-opacity").value / 100);
  const boxes = work.box ? [work.box] : [], points = [...(work.clicks || [])];
  // What is on its way to the server is drawn too, so that a burst shows under the hand.
  for (const {body} of waiting) {
    if (body.kind === "click") points.push([body.x, body.y, body.positive ? 1 : 0]);
    if (body.kind === "box") boxes.splice(0, 1, body.box);
  }
  if (drag && drag.box) boxes.push(drag.box);
  if (corner && cross) boxes.push(ordered(corner, cross));
  paint.lineWidth = 1.5;
  for (const [x0, y0, x1, y1] of boxes) {
    const [left, top] = toCanvas(x0 - 0.5, y0 - 0.5), [right, bottom] = toCanvas(x1 + 0.5, y1 + 0.5);
    paint.strokeStyle = "#ffd60a";
    paint.strokeRect(left, top, right - left, bottom - top);
  }
  // Shape as well as colour says which sign a click has.
  for (const [x, y, label] of points) {
    const [px, py] = toCanvas(x, y);
    paint.beginPath(); paint.arc(px, py, 6, 0, 7);
    paint.fillStyle = label ? "#19c15a" : "#f0483e"; paint.fill();
    paint.strokeStyle = "#ffffff"; paint.stroke();
    paint.beginPath(); paint.moveTo(px - 3, py); paint.lineTo(px + 3, py);
    if (label) { paint.moveTo(px, py - 3); paint.lineTo(px, py + 3); }
    paint.stroke();
  }
  if (cross) {
    const [px, py] = toCanvas(...cross);
    paint.beginPath();
    paint.moveTo(px - 12, py); paint.lineTo(px + 12, py); paint.moveTo(px, py - 12); paint.lineTo(px, py + 12);
    paint.strokeStyle = "#000000"; paint.lineWidth = 3; paint.stroke();
    paint.strokeStyle = "#ffffff"; paint.lineWidth = 1; paint.stroke();
  }
}

// ---------------------------------------------------------------- hands

const ordered = ([ax, ay], [bx, by]) => [Math.min(ax, bx), Math.min(ay, by), Math.max(ax, bx), Math.max(ay, by)];
const at = (event) => { const r = canvas.getBoundingClientRect(); return [event.clientX - r.left, event.clientY - r.top]; };

function click(point, adds) {
  if (within(point)) prompt({kind: "click", x: point[0], y: point[1], positive: adds});
  draw();
}

canvas.addEventListener("pointerdown", (event) => {
  if (!picture) return;
  canvas.focus();
  cross = corner = null;
  canvas.setPointerCapture(event.pointerId);
  const start = at(event), pans = space || event.button === 1;
  drag = {start, last: start, pans, button: event.button, box: null};
  event.preventDefault();
});

canvas.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const now = at(event);
  if (drag.pans) {
    view.x += now[0] - drag.last[0]; view.y += now[1] - drag.last[1];
  } else if (drag.button === 0 && (drag.box || Math.hypot(now[0] - drag.start[0], now[1] - drag.start[1]) > DRAG_PIXELS)) {
    drag.box = ordered(clamped(toImage(...drag.start)), clamped(toImage(...now)));
  }
  drag.last = now;
  draw();
});

canvas.addEventListener("pointerup", () => {
  if (!drag) return;
  const {start, pans, button, box} = drag;
  drag = null;
  if (pans) return;
  if (box) prompt({kind: "box", box});
  else if (button === 2) click(toImage(...start), !positive);
  else if (button === 0 && tool === "point") click(toImage(...start), positive);
  draw();
});

canvas.addEventListener("pointercancel", () => { drag = null; draw(); });
canvas.addEventListener("contextmenu", (event) => event.preventDefault());
canvas.addEventListener("wheel", (event) => {
  if (!picture) return;
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * 0.0015), ...at(event));
}, {passive: false});

function pick(name) {
  tool = name; corner = null;
  $("point").setAttribute("aria-pressed", String(name === "point"));
  $("boxed").setAttribute("aria-pressed", String(name === "box"));
  draw();
}

function toggleSign() {
  positive = !positive;
  $("sign").textContent = positive ? "Adds" : "Removes";
  $("sign").classList.toggle("removes", !positive);
}

const decide = (decision) => send("/decision", {decision});
const step = (kind) => prompt({kind});

const KEYS = {
  p: () => pick("point"), b: () => pick("box"), t: toggleSign, r: () => step("reset"),
  v: () => { visible = !visible; draw(); }, e: next, a: () => decide("accept"),
  x: () => decide("reject"), u: () => decide("unsure"), q: () => $("question").focus(),
  "+": () => zoom(1.25, ...middle()), "=": () => zoom(1.25, ...middle()), "-": () => zoom(0.8, ...middle()),
  0: () => { fit(); draw(); },
};
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};

function middle() {
  const {width, height} = canvas.getBoundingClientRect();
  return cross ? toCanvas(...cross) : [width / 2, height / 2];
}

document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase();
  if (event.target.matches("input:not([type=range])")) {
    if (key === "escape") canvas.focus();
    return;
  }
  if (event.ctrlKey || event.metaKey) {
    if (key === "z") { event.preventDefault(); step(event.shiftKey ? "redo" : "undo"); }
    if (key === "y") { event.preventDefault(); step("redo"); }
    return;
  }
  if (event.altKey) return;
  const onCanvas = event.target === canvas || event.target === document.body;
  if (key === " " && onCanvas) { space = true; event.preventDefault(); return; }
  if (key === "escape") { cross = corner = drag = null; draw(); return; }
  if (!picture && key !== "e") return;
  if (event.key in ARROWS && onCanvas) {
    const [dx, dy] = ARROWS[event.key], by = event.shiftKey ? 10 : 1;
    const from = cross || [Math.floor(picture.width / 2), Math.floor(picture.height / 2)];
    cross = clamped([from[0] + dx * by, from[1] + dy * by]);
    event.preventDefault(); draw();
  } else if (key === "enter" && onCanvas && cross) {
    if (tool === "point") click(cross, positive);
    else if (corner) { prompt({kind: "box", box: ordered(corner, cross)}); corner = null; }
    else corner = cross;
    event.preventDefault(); draw();
  } else if (key in KEYS && !event.repeat) {
    event.preventDefault();
    KEYS[key]();
  }
});
document.addEventListener("keyup", (event) => { if (event.key === " ") space = false; });
window.addEventListener("blur", () => { space = false; });
window.addEventListener("resize", () => { if (picture) fit(); draw(); });

$("point").addEventListener("click", () => pick("point"));
$("boxed").addEventListener("click", () => pick("box"));
$("sign").addEventListener("click", toggleSign);
for (const kind of ["undo", "redo", "reset"]) $(kind).addEventListener("click", () => step(kind));
for (const name of ["accept", "reject", "unsure"]) $(name).addEventListener("click", () => decide(name));
$("next").addEventListener("click", next);
$("mask-opacity").addEventListener("input", draw);
$("doubt-opacity").addEventListener("input", () => { draw(); if (work && !doubt) overlays(); });

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!work || !picture || !question) return;
  const options = $("options").value.split(",").map((text) => text.trim()).filter(Boolean);
  $("answer").textContent = "…";
  try {
    const said = await post(address("/ask"), {question, options: options.length ? options : null});
    const doubtful = said.calibrated ? "" : ", uncalibrated";
    $("answer").textContent = `${said.answer || "(no words)"} — confidence ${said.confidence.toFixed(2)}${doubtful}`;
  } catch (error) {
    $("answer").textContent = error.message;
  }
});

$("upload").addEventListener("submit", async (event) => {
  event.preventDefault();
  const file = $("file").files[0];
  if (!file) { say("choose a file first", true); return; }
  const form = new FormData();
  // Under a name of ours: the name of a file often is the name of a patient.
  form.append("file", file, "image");
  if ($("target").value.trim()) form.append("target", $("target").value.trim());
  say("opening…");
  try {
    const begun = await post("/api/sessions", {});
    await open(await call(`/api/sessions/${encodeURIComponent(begun.session)}/image`, {method: "POST", body: form}));
    say("");
  } catch (error) {
    say(error.message, true);
  }
});

(async () => {
  draw();
  await refreshQueue();
  const id = location.hash.slice(1);
  // After a reload the session goes on where it was.
  if (id) {
    try {
      await open(await call(`/api/sessions/${encodeURIComponent(id)}`));
      return;
    } catch (error) {
      location.hash = "";
    }
  }
  await next();
})();
