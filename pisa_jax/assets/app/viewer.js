// The viewer: two images in one place, zoom, and a brush. `props.value` holds what the server sends (app/visitor.py:
// Visitor.view); "brush", "mask" and "pin" are the events that it sends back.
const one = (selector) => element.querySelector(selector);
const [viewer, frame, stage, layer] = [".viewer", ".frame", ".stage", ".layer"].map(one);
const [before, after, mask, cursor] = ["img.before", "img.after", ".mask", ".cursor"].map(one);
const [divider, against, pin, clear, size] = [".divider", ".against", ".pin", ".clear", ".size"].map(one);
const brush = mask.getContext("2d");
const LONGEST_MASK = 1024;
let view = {}, zoom = "fit", border = 0.5, mode = null, painted = false;

const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

// --- Layout -------------------------------------------------------------------------------------------------------

function pixelSize() {  // CSS pixels per image pixel
  if (zoom !== "fit") return zoom / window.devicePixelRatio;
  return Math.min(stage.clientWidth / view.width, stage.clientHeight / view.height);
}

function layout() {
  if (!view.image) return;
  layer.style.width = `${view.width * pixelSize()}px`;
  layer.style.height = `${view.height * pixelSize()}px`;
  layer.classList.toggle("large", zoom === 4);
  moveBorder(border);
}

function moveBorder(to) {
  border = clamp(to, 0, 1);
  const width = frame.clientWidth;
  divider.style.left = `${border * 100}%`;
  divider.setAttribute("aria-valuenow", Math.round(border * 100));
  const shown = clamp(border * width - (layer.getBoundingClientRect().left - frame.getBoundingClientRect().left), 0, 1e6);
  before.style.clipPath = `inset(0 calc(100% - ${shown}px) 0 0)`;
}

function setZoom(to) {
  // The image point in the middle of the stage stays there.
  const x = (stage.scrollLeft + stage.clientWidth / 2) / layer.offsetWidth;
  const y = (stage.scrollTop + stage.clientHeight / 2) / layer.offsetHeight;
  zoom = to;
  element.querySelectorAll("[data-zoom]").forEach((button) =>
    button.setAttribute("aria-pressed", String(button.dataset.zoom === String(zoom))));
  layout();
  stage.scrollTo(x * layer.offsetWidth - stage.clientWidth / 2, y * layer.offsetHeight - stage.clientHeight / 2);
  moveBorder(border);
}

// --- What the server sends ----------------------------------------------------------------------------------------

async function show(image, url) {
  if (!url || image.dataset.url === url) return;
  image.dataset.url = url;
  const loaded = new Image();
  loaded.src = url;
  await loaded.decode().catch(() => {});  // no flicker: the old image stays until the new one can be drawn
  if (image.dataset.url !== url) return;
  image.src = url;
  image.dataset.shown = url;
}

function compare() {
  const left = against.value === "pinned" && view.pinned ? view.pinned : view.bicubic;
  show(before, left.url);
  one(".before-tag").textContent = left.label;
}

function update() {
  const fresh = props.value || {};
  const another = fresh.image !== view.image;
  view = fresh;
  one(".status").textContent = view.status || "";
  viewer.dataset.state = view.image ? "image" : "empty";
  pin.disabled = !view.image;
  element.querySelectorAll("[data-mode]").forEach((button) => { button.disabled = !view.image; });
  if (view.download) { const link = document.createElement("a"); link.href = view.download; link.download = ""; link.click(); }
  if (!view.image) return;
  const option = against.querySelector("[value=pinned]") || against.appendChild(new Option("", "pinned"));
  option.textContent = view.pinned ? `pinned: ${view.pinned.label}` : "pinned (nothing yet)";
  option.disabled = !view.pinned;
  if (!view.pinned) against.value = "bicubic";
  if (another) {
    const shrink = Math.min(1, LONGEST_MASK / Math.max(view.width, view.height));
    mask.width = Math.round(view.width * shrink);
    mask.height = Math.round(view.height * shrink);
    painted = false;
    setMode(null);
    setZoom("fit");
  }
  stage.setAttribute("aria-label", `${view.result.label}, compared with ${view.bicubic.label}`);
  one(".after-tag").textContent = view.result.label;
  show(after, view.result.url);
  compare();
  layout();
}

// --- Brush --------------------------------------------------------------------------------------------------------

function setMode(to) {
  mode = mode === to ? null : to;
  viewer.classList.toggle("painting", mode !== null);
  element.querySelectorAll("[data-mode]").forEach((button) =>
    button.setAttribute("aria-pressed", String(button.dataset.mode === mode)));
  clear.hidden = size.hidden = mode === null;
  cursor.hidden = true;
}

const radius = () => (size.querySelector("input").value / 200) * Math.min(mask.width, mask.height);

function dab(from, to) {
  brush.globalCompositeOperation = mode === "erase" ? "destination-out" : "source-over";
  brush.strokeStyle = "#ff2bd6";
  brush.lineCap = "round";
  brush.lineWidth = 2 * radius();
  brush.beginPath();
  brush.moveTo(...from);
  brush.lineTo(to[0] + 0.01, to[1]);
  brush.stroke();
}

function placeCursor([x, y]) {
  cursor.hidden = false;
  cursor.style.left = `${(x / mask.width) * 100}%`;
  cursor.style.top = `${(y / mask.height) * 100}%`;
  cursor.style.width = cursor.style.height = `${(2 * radius() / mask.width) * layer.offsetWidth}px`;
}

function place(event) {
  const box = mask.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * mask.width, ((event.clientY - box.top) / box.height) * mask.height];
}

function send() {
  painted = true;
  trigger("mask", { png: mask.toDataURL("image/png") });
}

let last = null, keyboard = null;
mask.addEventListener("pointerdown", (event) => {
  mask.setPointerCapture(event.pointerId);
  last = place(event);
  dab(last, last);
  event.preventDefault();
});
mask.addEventListener("pointermove", (event) => {
  const here = place(event);
  placeCursor(here);
  if (last) { dab(last, here); last = here; }
});
const endStroke = () => { if (last) { last = null; send(); } };
mask.addEventListener("pointerup", endStroke);
mask.addEventListener("pointercancel", endStroke);
clear.addEventListener("click", () => { brush.clearRect(0, 0, mask.width, mask.height); if (painted) trigger("mask", { png: "" }); painted = false; });

// --- Moving the border and the image ------------------------------------------------------------------------------

divider.addEventListener("pointerdown", (event) => { divider.setPointerCapture(event.pointerId); event.preventDefault(); divider.focus(); });
divider.addEventListener("pointermove", (event) => {
  if (!divider.hasPointerCapture(event.pointerId)) return;
  const box = frame.getBoundingClientRect();
  moveBorder((event.clientX - box.left) / box.width);
});
divider.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -0.02, ArrowDown: -0.02, ArrowRight: 0.02, ArrowUp: 0.02, Home: -1, End: 1, PageDown: -0.1, PageUp: 0.1 }[event.key];
  if (step === undefined) return;
  moveBorder(border + step);
  event.preventDefault();
});
let grip = null;
stage.addEventListener("pointerdown", (event) => {
  if (mode || event.pointerType !== "mouse" || event.button) return;
  grip = [event.clientX + stage.scrollLeft, event.clientY + stage.scrollTop];
  stage.setPointerCapture(event.pointerId);
  stage.classList.add("dragging");
});
stage.addEventListener("pointermove", (event) => { if (grip) stage.scrollTo(grip[0] - event.clientX, grip[1] - event.clientY); });
const release = () => { grip = null; stage.classList.remove("dragging"); };
stage.addEventListener("pointerup", release);
stage.addEventListener("pointercancel", release);
stage.addEventListener("scroll", () => moveBorder(border));
stage.addEventListener("keydown", (event) => {
  const zooms = { 0: "fit", 1: 1, 4: 4 };
  if (event.key in zooms) return setZoom(zooms[event.key]);
  if (!mode) return;  // the browser scrolls
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  keyboard ??= [mask.width / 2, mask.height / 2];
  if (event.key in arrows) {
    const step = event.shiftKey ? 4 : Math.max(radius() / 2, 1);
    keyboard = [0, 1].map((axis) => clamp(keyboard[axis] + step * arrows[event.key][axis], 0, axis ? mask.height : mask.width));
  } else if (event.key === " " || event.key === "Enter") {
    dab(keyboard, keyboard);
    send();
  } else return;
  placeCursor(keyboard);
  event.preventDefault();
});
new ResizeObserver(layout).observe(frame);

// --- Controls, dropped and pasted files ---------------------------------------------------------------------------

element.querySelectorAll("[data-zoom]").forEach((button) =>
  button.addEventListener("click", () => setZoom(button.dataset.zoom === "fit" ? "fit" : Number(button.dataset.zoom))));
element.querySelectorAll("[data-mode]").forEach((button) =>
  button.addEventListener("click", () => {
    setMode(button.dataset.mode);
    if (!mode) return;
    stage.focus({ preventScroll: true });
    trigger("brush", {});
  }));
against.addEventListener("change", compare);
pin.addEventListener("click", () => trigger("pin", {}));

function take(files) {
  const input = document.querySelector("#upload input[type=file]");
  if (!input || !files.length) return;
  const transfer = new DataTransfer();
  transfer.items.add(files[0]);
  input.files = transfer.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
}
frame.addEventListener("dragover", (event) => { event.preventDefault(); frame.classList.add("over"); });
frame.addEventListener("dragleave", () => frame.classList.remove("over"));
frame.addEventListener("drop", (event) => { event.preventDefault(); frame.classList.remove("over"); take(event.dataTransfer.files); });
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) take(event.clipboardData.files); });

watch("value", update);
update();
