// The explorer's second half: from what is chosen to what is seen, said and saved.

Object.assign(Explorer.prototype, {
  /** The maps of a unit on one side: as written, swapped, and which of them (or their difference) is to be shown. */
  unitMap(number, unit) {
    const { model, kind } = this.sides[number];
    const text = this.text(unit), words = this.unitWords(unit);
    const block = (id) => this.blocks[`${model}/${id}`];
    const written = meanMap(block(text.id), kind, words);
    if (this.state.swap === "written" || !text.swap) return { shown: this.state.swap === "difference" ? null : written, block: block(text.id), text };
    const other = meanMap(block(text.swap), kind, words);
    const shown = this.state.swap === "swapped" ? other : written && other && other.map((value, i) => value - written[i]);
    return { shown, block: block(text.swap), text: this.scene.texts.find((item) => item.id === text.swap) };
  },

  draw() {
    const { state } = this, unit = state.over ?? state.unit;
    this.pictures.forEach((picture, number) => {
      if (!picture.size[0]) return;
      const side = this.sides[number], kind = this.scene.models[side.model].kinds[side.kind];
      const first = Object.keys(this.blocks).find((key) => key.startsWith(`${side.model}/`));
      const found = unit ? this.unitMap(number, unit) : { shown: null, block: this.blocks[first] };
      const difference = state.swap === "difference", signed = kind.signed || difference;
      const colours = state.colours === "auto" ? (signed ? "orange-purple" : "viridis") : state.colours;
      picture.layers[1].style.opacity = state.opacity;
      picture.show(found.shown, found.block.shape.slice(2), this.tables[colours], this.range(found, side, signed, difference), unit ? this.unitName(unit) : "");
      picture.mark({ grid: state.grid, truth: state.truth, outlines: state.outlines, spot: state.spot });
      picture.score.replaceChildren(...this.score(number, unit, found.shown));
      picture.colours = colours;
    });
    this.highlight(unit);
    this.listHere();
    if (state.unit) this.spoken.textContent = this.pictures.map((picture) => picture.stage.getAttribute("aria-label")).join(" ");
  },

  range(found, side, signed, difference) {
    if (!found.shown) return [0, 1];
    if (this.state.range === "map" || difference) return limits([found.shown], signed);
    const every = found.text.words.map((_, word) => meanMap(found.block, side.kind, [word])).filter(Boolean);
    return limits(every, signed);
  },

  /** The score line of one picture, as nodes. */
  score(number, unit, map) {
    const { state, scene } = this, side = this.sides[number];
    if (!unit) return ["Choose a word of the report, or a place in the picture."];
    const bold = (text) => make("b", "", {}, text);
    const line = [bold(`“${this.unitName(unit)}” `)];
    const text = this.text(unit);
    if (state.swap !== "written" && !text.swap) return [...line, "This text names no side: there is nothing to exchange."];
    if (!map) return [...line, "has no map: it lies beyond the token limit, or the method leaves it out."];
    if (state.swap === "difference") {
      const size = map.reduce((sum, value) => sum + Math.abs(value), 0) / map.length;
      return [...line, `Change when left and right are exchanged: mean ${number3(size)}, largest ${number3(Math.max(...map.map(Math.abs)))}.`];
    }
    if (state.truth < 0) return scene.truths.length ? line : [...line, "No region is known for this image: no score."];
    const id = state.swap === "swapped" ? text.swap : text.id;
    const pair = scene.scores[`${side.model}/${id}`][side.kind][state.truth][this.unitPlace(unit)];
    const truth = scene.truths[state.truth];
    if (!pair || pair[1] === null) return [...line, `No score: ${truth.label} lies outside what the model saw.`];
    const [contrast, hit] = pair;
    const chance = truth.chance[side.model];
    const game = hit === 1 ? "hit" : hit === 0 ? "miss" : `${(100 * hit).toFixed(0)} % (tie)`;
    line.push(`against ${truth.label}: CNR `, bold(signed2(contrast)), ", pointing game ", bold(game), chance === null ? "" : ` (chance ${(100 * chance).toFixed(0)} %)`);
    if (contrast < 0) line.push(make("em", "", {}, " Inverted: lower on the finding than elsewhere."));
    return line;
  },

  highlight(unit) {
    const chosen = unit ? new Set(this.unitWords(unit)) : new Set();
    const pinned = this.state.unit ? new Set(this.unitWords(this.state.unit)) : new Set();
    let stop = null;
    for (const text of this.texts) {
      const swap = this.state.swap !== "written" && this.scene.texts.find((other) => other.id === text.swap);
      this.words[text.id].forEach((word, index) => {
        const on = this.state.unit?.text === text.id && pinned.has(index);
        word.classList.toggle("gx-on", on);
        word.classList.toggle("gx-over", unit?.text === text.id && chosen.has(index));
        word.setAttribute("aria-pressed", String(on));
        word.setAttribute("tabindex", "-1");
        if (on && !stop) stop = word;
        const [start, end] = (swap || text).words[index];
        const shown = (swap || text).text.slice(start, end);
        if (word.textContent !== shown) word.textContent = shown;
        word.classList.toggle("gx-swapped", shown !== text.text.slice(text.words[index][0], text.words[index][1]));
      });
    }
    (stop ?? this.words[this.texts[0].id][0])?.setAttribute("tabindex", "0"); // one stop for Tab, arrows from there
    for (const chip of this.root.querySelectorAll(".gx-chip")) chip.setAttribute("aria-pressed", String(Number(chip.dataset.truth) === this.state.truth));
  },

  // ------------------------------------------------------------------------- from the picture to the words

  look(x, y) {
    this.state.spot = [x, y];
    this.draw();
  },

  /** The words (or sentences) with the highest value at the chosen region, best first. */
  lookers(number) {
    const { model, kind } = this.sides[number], picture = this.pictures[number];
    const cell = this.state.spot && picture.cell(...this.state.spot);
    if (!cell) return [];
    const sentences = this.scene.models[model].kinds[kind].unit === "sentence" || this.state.mode === "sentence";
    const found = [];
    for (const text of this.texts) {
      const units = sentences ? [...Array(text.sentences).keys()].map((index) => ({ text: text.id, type: "sentence", index })) : text.words.map((_, index) => ({ text: text.id, type: "word", index }));
      for (const unit of units) {
        const map = this.unitMap(number, unit).shown;
        if (map) found.push({ unit, value: map[cell[0] * picture.grid[1] + cell[1]] });
      }
    }
    return found.sort((a, b) => b.value - a.value).slice(0, 8);
  },

  listHere() {
    const asked = JSON.stringify([this.state.spot, this.sides, this.state.mode, this.state.swap, this.texts.length, this.scene.title]);
    if (asked === this.listed && this.here.childNodes.length) return; // a list made anew would lose the focus in it
    this.listed = asked;
    for (const word of this.root.querySelectorAll(".gx-here")) word.classList.remove("gx-here");
    if (!this.state.spot) { this.here.replaceChildren(); return; }
    const lists = this.pictures.map((picture, number) => {
      const found = this.lookers(number);
      const top = Math.max(...found.map((item) => Math.abs(item.value)), 1e-12);
      if (number === 0) for (const { unit } of found.slice(0, 4)) for (const word of this.unitWords(unit)) this.words[unit.text][word].classList.add("gx-here");
      const rows = found.map(({ unit, value }) => make("li", "", {}, make("button", "", { type: "button", title: this.text(unit).name, onclick: () => this.pin(unit, { quiet: true }) },
        make("span", "gx-name", {}, this.unitName(unit)), make("span", "gx-amount", {}, number3(value)), make("i", value < 0 ? "gx-minus" : "", { style: `width:${(100 * Math.abs(value)) / top}%` }))));
      return make("div", "", {}, make("h4", "", {}, `${picture.model.name}, ${picture.kind.name.replace("_", " ")}`), rows.length ? make("ol", "", {}, ...rows) : make("p", "gx-note", {}, "The model did not see this place."));
    });
    this.here.replaceChildren(make("h3", "", {}, "Words that look here"), make("div", "gx-columns", {}, ...lists));
  },

  // -------------------------------------------------------------------------------------------- the keyboard

  key(event) {
    if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {
      ArrowRight: () => this.step(1), ArrowLeft: () => this.step(-1),
      ArrowDown: () => this.step(1, true), ArrowUp: () => this.step(-1, true),
      s: () => this.set("mode", this.state.mode === "word" ? "sentence" : "word"),
      g: () => this.set("grid", !this.state.grid),
      t: () => this.set("outlines", !this.state.outlines),
      w: () => this.set("swap", { written: "swapped", swapped: "difference", difference: "written" }[this.state.swap]),
      Escape: () => { Object.assign(this.state, { unit: null, over: null, spot: null }); this.draw(); this.host.pick({}); },
      Enter: () => event.target.matches(".gx-word") && event.target.click(),
      " ": () => event.target.matches(".gx-word") && event.target.click(),
    }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act || (event.target.matches("button") && (event.key === "Enter" || event.key === " "))) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  },

  /** To the next word or sentence, over the borders of texts. */
  step(by, sentence = this.state.mode === "sentence") {
    const every = this.texts.flatMap((text) => (sentence ? [...Array(text.sentences).keys()] : text.words).map((_, index) => ({ text: text.id, type: sentence ? "sentence" : "word", index })));
    if (!every.length) return;
    const unit = this.state.unit;
    const words = unit ? this.unitWords(unit) : [];
    const anchor = by > 0 ? words.at(-1) : words[0];
    const at = unit ? every.findIndex((item) => item.text === unit.text && (sentence ? item.index === this.text(unit).words[anchor][2] : item.index === anchor)) : by > 0 ? -1 : 0;
    this.pin(every[(at + by + every.length) % every.length], { focus: true, quiet: true });
  },

  // -------------------------------------------------------------------------------------- kernel and files

  ask(message) {
    this.say("Working …");
    this.host.send(message);
  },

  told(message) {
    if (message.type === "error") { this.asked = false; this.say(message.text, true); }
    if (message.type === "page") { save(new Blob([message.html], { type: "text/html" }), message.name); this.say(`Saved ${message.name}.`); }
  },

  say(text, bad = false) {
    this.status.textContent = text;
    this.status.classList.toggle("gx-bad", bad);
  },

  savePicture() {
    const [width, height] = this.pictures[0].size, ratio = window.devicePixelRatio || 1;
    const gap = 16 * ratio, foot = 92 * ratio, unit = this.state.unit;
    const canvas = make("canvas", "", { width: this.pictures.length * (width + gap) + gap, height: height + foot + 2 * gap });
    const context = canvas.getContext("2d");
    Object.assign(context, { fillStyle: "#fff" });
    context.fillRect(0, 0, canvas.width, canvas.height);
    this.pictures.forEach((picture, number) => {
      const left = gap + number * (width + gap);
      picture.layers.forEach((layer, index) => {
        context.globalAlpha = index === 1 ? this.state.opacity : 1;
        context.drawImage(layer, left, gap);
      });
      const bar = context.createLinearGradient(left, 0, left + width, 0);
      for (let i = 0; i < 17; i++) {
        const colour = this.tables[picture.colours][Math.min(255, i * 16)];
        bar.addColorStop(i / 16, `rgb(${colour & 255}, ${(colour >> 8) & 255}, ${(colour >> 16) & 255})`);
      }
      const below = height + gap * 1.4;
      Object.assign(context, { globalAlpha: picture.map ? 1 : 0, fillStyle: bar });
      context.fillRect(left, below, width, 8 * ratio);
      Object.assign(context, { globalAlpha: 1, fillStyle: "#222", font: `${12 * ratio}px system-ui, sans-serif` });
      const ticks = picture.ticks.map((tick) => tick.textContent);
      const lines = [picture.map ? `${ticks[0]}  to  ${ticks[2]}` : "", `${picture.model.name}, ${picture.kind.name.replace("_", " ")}`, unit ? `“${this.unitName(unit)}”` : "", this.scene.title];
      lines.forEach((text, i) => context.fillText(text, left, below + (24 + 16 * i) * ratio, width));
    });
    canvas.toBlob((blob) => save(blob, `${this.scene.title.split(" ")[0] || "map"}.png`));
  },
});

const number3 = (value) => number(value, 3);
const signed2 = (value) => (value === null ? "∞" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`);

function save(blob, name) {
  const link = make("a", "", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** In a page of its own: scene and maps stand in it. */
export function page(root, scene, maps) {
  return new Explorer(root, { live: false, scene: () => scene, maps: () => maps, listen: () => null, send: () => {}, pick: (unit) => { root.dataset.selection = JSON.stringify(unit); } });
}

/** In a notebook: anywidget calls this with the kernel's model. */
export default {
  render({ model, el }) {
    const root = el.appendChild(document.createElement("div"));
    const explorer = new Explorer(root, {
      live: true,
      scene: () => model.get("scene"),
      maps: () => model.get("maps"),
      send: (message) => model.send(message),
      pick: (unit) => { model.set("selection", unit); model.save_changes(); },
      listen(changed, told) {
        model.on("change:revision", changed);
        model.on("msg:custom", told);
        return () => { model.off("change:revision", changed); model.off("msg:custom", told); };
      },
    });
    return () => explorer.close();
  },
};
