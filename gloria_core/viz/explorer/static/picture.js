// One picture: the radiograph, a map over it, outlines over both; with its own choice of model and map.

/** Element with class, attributes and children; text is always set as text. */
export function make(tag, name = "", attributes = {}, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function select(label, options, value, change) {
  const list = make("select", "", { "aria-label": label, title: label, onchange: () => change(list.value) });
  for (const [key, text] of options) list.append(make("option", "", { value: key, selected: String(key) === String(value) }, text));
  return list;
}

const PLACES = [["upper left", "upper middle", "upper right"], ["middle left", "centre", "middle right"], ["lower left", "lower middle", "lower right"]];

export class Picture {
  /** Calls `choose(what, value)` for a new model or kind, and `choosePoint(x, y)` (file pixels) for a click. */
  constructor(number, { choose, choosePoint }) {
    this.number = number;
    this.choose = choose;
    this.layers = ["image", "map", "marks"].map((name) => make("canvas", `gx-layer gx-${name}`));
    this.stage = make("div", "gx-stage", {
      role: "img", tabindex: -1,
      onpointermove: (event) => this.read(event),
      onpointerleave: () => this.read(null),
      onclick: (event) => choosePoint(...this.filePoint(event)),
    }, ...this.layers);
    this.pickers = make("div", "gx-pickers");
    this.bar = make("div", "gx-bar");
    this.ticks = ["low", "middle", "high"].map((name) => make("span", `gx-${name}`));
    this.value = make("div", "gx-value", { "aria-live": "off" });
    this.score = make("div", "gx-score");
    this.formula = make("div", "gx-formula");
    this.rows = make("div", "gx-rows");
    this.element = make("figure", "gx-picture", { "data-side": number }, this.pickers, this.stage,
      make("div", "gx-legend", {}, this.bar, make("div", "gx-ticks", {}, ...this.ticks)),
      make("figcaption", "", {}, this.value, this.score, make("div", "gx-about", {}, this.formula, this.rows)));
    this.size = [0, 0];
    this.map = null;
  }

  /** A new scene, model or kind: everything that does not depend on the word. */
  setup(scene, photo, { model, kind }) {
    Object.assign(this, { scene, photo });
    this.model = scene.models[model];
    this.kind = this.model.kinds[kind];
    const kinds = this.model.kinds.map((item, index) => [index, item.label]);
    this.pickers.replaceChildren(
      select(`Model of picture ${this.number + 1}`, scene.models.map((item, index) => [index, item.name]), model, (value) => this.choose("model", Number(value))),
      select(`Map of picture ${this.number + 1}`, kinds, kind, (value) => this.choose("kind", Number(value))));
    this.formula.innerHTML = this.kind.formula; // made by our own kernel from the method's formula
    this.formula.setAttribute("title", this.kind.latex);
    this.rows.textContent = `${this.kind.rows} Objective: ${this.model.objective}${this.model.behavior === "published" ? ", as published" : ""}.`;
    this.stage.style.aspectRatio = `${scene.image.width} / ${scene.image.height}`;
    this.size = [0, 0];
    this.resize();
  }

  /** Match the canvases to the screen's own pixels; true where that changed them. */
  resize() {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(this.stage.clientWidth * ratio);
    const height = Math.round((width * this.scene.image.height) / this.scene.image.width);
    if (!width || (width === this.size[0] && height === this.size[1])) return false;
    this.size = [width, height];
    for (const layer of this.layers) {
      Object.assign(layer, { width, height });
      Object.assign(layer.style, { width: `${width / ratio}px`, height: `${height / ratio}px` }); // one to one, never stretched
    }
    const context = this.layers[0].getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(this.photo, 0, 0, width, height);
    this.pixels = this.layers[1].getContext("2d").createImageData(width, height);
    this.axes = null;
    return true;
  }

  /** Colour the map (h * w values, or null for none) and say what it is. */
  show(map, [h, w], table, range, name) {
    this.map = map;
    this.grid = [h, w];
    if (this.axes?.grid !== `${h}x${w}`) {
      const [x, y, width, height] = this.model.frame;
      const across = axis(this.size[0], this.scene.image.width, x, width, w);
      const down = axis(this.size[1], this.scene.image.height, y, height, h);
      this.axes = { across, down, grid: `${h}x${w}` };
    }
    const context = this.layers[1].getContext("2d");
    if (map) {
      paint(new Uint32Array(this.pixels.data.buffer), map, w, this.axes.across, this.axes.down, table, range);
      context.putImageData(this.pixels, 0, 0);
    } else context.clearRect(0, 0, ...this.size);
    this.bar.style.background = `linear-gradient(to right, ${stops(table).join(", ")})`;
    this.bar.parentElement.classList.toggle("gx-off", !map);
    const middle = (range[0] + range[1]) / 2;
    [range[0], middle, range[1]].forEach((value, i) => { this.ticks[i].textContent = shortNumber(Math.abs(value) < 1e-9 ? 0 : value); });
    this.stage.setAttribute("aria-label", this.alt(name));
  }

  alt(name) {
    const what = `Radiograph ${this.scene.title}`;
    if (!this.map) return name ? `${what}. No map for “${name}”.` : `${what}. No word is chosen.`;
    const [h, w] = this.grid;
    const best = this.map.indexOf(Math.max(...this.map));
    const [x, y, width, height] = this.model.frame;
    const third = (value, size) => Math.min(2, Math.max(0, Math.floor((3 * value) / size)));
    const across = third(x + (((best % w) + 0.5) * width) / w, this.scene.image.width);
    const down = third(y + ((Math.floor(best / w) + 0.5) * height) / h, this.scene.image.height);
    return `${what}, with the ${this.kind.name.replace("_", " ")} map of “${name}” by ${this.model.name}. Highest in the ${PLACES[down][across]} of the picture, ${shortNumber(this.map[best])}.`;
  }

  /** Grid, outlines and the chosen region; `truth` is the one in full line, or -1. */
  mark({ grid, truth, outlines, point }) {
    const context = this.layers[2].getContext("2d");
    const scale = this.size[0] / this.scene.image.width;
    const unit = window.devicePixelRatio || 1;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, ...this.size);
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const [x, y, width, height] = this.model.frame;
    const [h, w] = this.grid;
    const stroke = (colour, thick, dash = []) => {
      Object.assign(context, { strokeStyle: colour, lineWidth: (thick * unit) / scale });
      context.setLineDash(dash.map((part) => (part * unit) / scale));
      context.stroke();
    };
    context.save();
    context.beginPath();
    context.rect(x, y, width, height);
    context.clip(); // no mark of the map outside what the model saw
    if (grid) {
      context.beginPath();
      for (let i = 0; i <= w; i++) { context.moveTo(x + (i * width) / w, y); context.lineTo(x + (i * width) / w, y + height); }
      for (let i = 0; i <= h; i++) { context.moveTo(x, y + (i * height) / h); context.lineTo(x + width, y + (i * height) / h); }
      stroke("rgba(0, 0, 0, 0.5)", 2);
      stroke("rgba(255, 255, 255, 0.75)", 0.8);
    }
    if (point) {
      const cell = this.cell(...point);
      if (cell) {
        context.beginPath();
        context.rect(x + (cell[1] * width) / w, y + (cell[0] * height) / h, width / w, height / h);
        stroke("#000", 4);
        stroke("#fff", 2);
      }
    }
    context.restore();
    if (!outlines) return;
    this.scene.truths.forEach((item, index) => {
      context.beginPath();
      for (const line of item.lines) {
        for (let i = 0; i < line.length; i += 2) context[i ? "lineTo" : "moveTo"](line[i], line[i + 1]);
        context.closePath();
      }
      for (const box of item.boxes) context.rect(...box);
      if (index === truth) { stroke("rgba(0, 0, 0, 0.6)", 4); stroke("#00e5ff", 2); }
      else stroke("rgba(0, 229, 255, 0.75)", 1.2, [4, 3]);
    });
  }

  /** [row, column] of the region at a point of the file; null outside what the model saw. */
  cell(px, py) {
    const [x, y, width, height] = this.model.frame;
    const [h, w] = this.grid;
    const row = Math.floor(((py - y) / height) * h), column = Math.floor(((px - x) / width) * w);
    return row >= 0 && row < h && column >= 0 && column < w ? [row, column] : null;
  }

  filePoint(event) {
    const box = this.layers[0].getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.scene.image.width, ((event.clientY - box.top) / box.height) * this.scene.image.height];
  }

  /** The raw value under the pointer, its region and its pixel. */
  read(event) {
    if (!event || !this.grid) { this.value.textContent = ""; return; }
    const [x, y] = this.filePoint(event);
    const cell = this.cell(x, y);
    const pixel = `pixel (${Math.floor(x)}, ${Math.floor(y)})`;
    if (!cell) { this.value.textContent = `${pixel}: outside what the model saw`; return; }
    const [row, column] = cell, index = row * this.grid[1] + column;
    const place = `region ${index} (row ${row}, column ${column} of ${this.grid[0]} × ${this.grid[1]}), ${pixel}`;
    if (!this.map) { this.value.textContent = place; return; }
    const canvas = [x / this.scene.image.width, y / this.scene.image.height].map((part, i) => Math.min(this.size[i] - 1, Math.max(0, Math.floor(part * this.size[i]))));
    const value = valueAt(this.map, this.grid[1], this.axes.across, this.axes.down, ...canvas);
    this.value.textContent = `value ${shortNumber(this.map[index])} (drawn ${shortNumber(value)}) · ${place}`;
  }
}
