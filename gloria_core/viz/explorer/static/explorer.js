// The explorer: a report whose words draw their maps. One scene, some state, and what the reader does to it.
//
// `host`: { scene(), maps(), live, listen(changed, onMessage), send(message), pick(selection) }. In a notebook it is the
// widget's kernel; in an exported page it is the page itself.

const KEYS = "Keys: ← → words · ↑ ↓ sentences · S sentence mode · G grid · T truth · W swap sides · Esc clear";

class Explorer {
  constructor(root, host) {
    Object.assign(this, { root, host });
    this.state = { mode: "word", colours: "auto", opacity: 0.6, range: "map", grid: false, outlines: true, swap: "written", truth: -1, unit: null, hovered: null, point: null };
    root.classList.add("gx");
    root.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's own keys stay out of here
    root.setAttribute("tabindex", "-1");
    root.addEventListener("keydown", (event) => this.key(event));
    this.theme();
    this.watch = new ResizeObserver(() => { if (this.pictures?.some((picture) => picture.resize())) this.draw(); });
    this.watch.observe(root);
    this.leave = host.listen(() => this.load(), (message) => this.onMessage(message));
    this.load();
  }

  close() { this.watch.disconnect(); this.leave?.(); }

  theme() {
    const body = document.body;
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const follow = () => {
      const light = body.dataset.jpThemeLight ?? (body.className.includes("vscode-dark") ? "false" : body.className.includes("vscode-light") ? "true" : String(!dark.matches));
      this.root.dataset.theme = light === "false" ? "dark" : "light";
    };
    dark.addEventListener("change", follow);
    new MutationObserver(follow).observe(body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
    follow();
  }

  /** A new scene: another study, or the same with one more text. */
  async load() {
    const scene = this.host.scene(), maps = this.host.maps();
    const photo = new Image();
    photo.src = `data:image/png;base64,${scene.image.png}`;
    await photo.decode();
    const same = this.scene?.title === scene.title;
    this.scene = scene;
    this.blocks = {};
    for (const [key, shape] of Object.entries(scene.shapes)) this.blocks[key] = { shape, data: floats(maps[key]) };
    this.tables = Object.fromEntries(Object.entries(scene.colours).map(([name, text]) => [name, colourTable(text)]));
    this.letters = Object.fromEntries(scene.texts.map((text) => [text.id, Array.from(text.text)]));
    this.texts = scene.texts.filter((text) => !text.hidden && text.words.length);
    if (!same || !this.choices) this.choices = this.firstChoices();
    this.build(photo);
    const own = this.phraseRequested && this.texts.findLast((text) => text.own);
    this.phraseRequested = false;
    const first = own ? { text: own.id, type: "all", index: 0 } : same ? this.state.unit : this.firstUnit();
    this.pin(first, { quiet: true });
    this.setStatus("");
  }

  /** Index of a model's kind of map by name; its first kind where it has none of that name. */
  kindIndex(model, name) { return Math.max(0, this.scene.models[model].kinds.findIndex((kind) => kind.name === name)); }

  /** Two models side by side by their cosine; one model by its attention and its cosine. */
  firstChoices() {
    const pairs = this.scene.models.length > 1 ? [[0, "cosine"], [1, "cosine"]] : [[0, "attention"], [0, "cosine"]];
    return pairs.map(([model, name]) => ({ model, kind: this.kindIndex(model, name) }));
  }

  firstUnit() {
    const start = this.scene.start;
    if (start && this.texts.some((text) => text.id === start.text)) return start;
    const text = this.texts.find((item) => item.phrases.length) ?? this.texts[0];
    return text.phrases.length ? { text: text.id, type: "phrase", index: 0 } : { text: text.id, type: "word", index: 0 };
  }

  // ------------------------------------------------------------------------------------------------ the page

  build(photo) {
    this.photo = photo;
    this.words = {};
    this.status = make("div", "gx-status", { role: "status", "aria-live": "polite" });
    this.spoken = make("div", "gx-hidden", { "aria-live": "polite" });
    this.top = make("div", "gx-here-list");
    this.pictures = this.choices.map((_, number) => new Picture(number, {
      choose: (what, value) => this.choosePicture(number, what, value),
      choosePoint: (x, y) => this.choosePoint(x, y),
    }));
    this.root.replaceChildren(
      this.header(), this.toolbar(),
      make("div", "gx-body", {},
        make("section", "gx-report", { "aria-label": "Report" }, ...this.texts.map((text) => this.paragraph(text)), this.truths(), this.ownPhrase()),
        make("div", "gx-right", {}, make("div", "gx-pictures", {}, ...this.pictures.map((picture) => picture.element)), this.top)),
      make("footer", "gx-foot", {}, KEYS), this.status, this.spoken);
    this.setupPictures();
  }

  setupPictures() {
    this.pictures.forEach((picture, number) => picture.setup(this.scene, this.photo, this.choices[number]));
  }

  header() {
    const studies = this.host.live ? this.scene.studies ?? [] : [];
    const pick = studies.length > 1 && select("Study", studies.map((id) => [id, id]), this.scene.study, (id) => this.request({ type: "study", id }));
    return make("header", "gx-header", {}, make("h2", "", {}, this.scene.title || "Attention explorer"), pick ? make("label", "", {}, "Study ", pick) : null);
  }

  toolbar() {
    const state = this.state;
    const toggle = (key, text, hint) => make("button", "gx-toggle", { type: "button", "data-key": key, "aria-pressed": String(state[key]), title: hint, onclick: () => this.set(key, !state[key]) }, text);
    const radio = (key, label, options) => make("div", "gx-radio", { role: "group", "aria-label": label, "data-key": key }, ...options.map(([value, text, hint]) =>
      make("button", "", { type: "button", "data-value": value, "aria-pressed": String(state[key] === value), title: hint, onclick: () => this.set(key, value) }, text)));
    const field = (text, element) => make("label", "gx-field", {}, make("span", "", {}, text), element);
    const group = (text, element) => make("div", "gx-field", {}, make("span", "", {}, text), element);
    const colours = [["auto", "by map"], ...Object.keys(this.scene.colours).map((name) => [name, name])];
    const slider = make("input", "gx-opacity", { type: "range", min: 0, max: 1, step: 0.05, value: state.opacity, "aria-label": "Opacity of the map", oninput: () => this.set("opacity", Number(slider.value)) });
    return make("div", "gx-toolbar", { role: "group", "aria-label": "How maps are shown" },
      group("Choose", radio("mode", "What a click chooses", [["word", "Word", "one word"], ["sentence", "Sentence", "the mean over a sentence's words (S)"]])),
      group("Sides", radio("swap", "Left and right in the text", [["written", "As written", "the text as written"], ["swapped", "Swapped", "left and right exchanged in the text, which is then encoded anew (W)"], ["difference", "Difference", "swapped minus as written"]])),
      field("Colours", select("Colour map", colours, state.colours, (value) => this.set("colours", value))),
      field("Range", select("Range of the colours", [["map", "this map"], ["text", "all words"]], state.range, (value) => this.set("range", value))),
      field("Opacity", slider),
      group("Show", make("div", "gx-buttons", {}, toggle("grid", "Grid", "the model's regions (G)"), this.scene.truths.length ? toggle("outlines", "Truth", "known regions (T)") : null)),
      group("Save", make("div", "gx-buttons", {},
        make("button", "gx-png", { type: "button", title: "the pictures as they are now", onclick: () => this.savePicture() }, "PNG"),
        this.host.live ? make("button", "gx-page", { type: "button", title: "a page that works without a kernel and without a network", onclick: () => this.request({ type: "export" }) }, "Page") : null)));
  }

  paragraph(text) {
    const box = make("p", "gx-text", { "data-text": text.id });
    const spans = (this.words[text.id] = []);
    let place = 0, sentence = null, current = -1;
    text.words.forEach(([start, end, of], index) => {
      if (of !== current || !sentence) {
        box.append(this.slice(text, place, start));
        sentence = make("span", "gx-sentence");
        box.append(sentence);
        current = of;
      } else sentence.append(this.slice(text, place, start));
      const unit = () => (this.state.mode === "sentence" && of >= 0 ? { text: text.id, type: "sentence", index: of } : { text: text.id, type: "word", index });
      const word = make("span", "gx-word", {
        role: "button", tabindex: -1, "aria-pressed": "false", "data-word": index,
        onclick: () => this.pin(unit()), onpointerenter: () => this.hover(unit()), onpointerleave: () => this.hover(null),
      }, this.slice(text, start, end));
      if (text.phrases.some((phrase) => phrase.words.includes(index))) word.classList.add("gx-named");
      spans.push(word);
      sentence.append(word);
      place = end;
    });
    const rest = this.slice(text, place, Math.max(place, text.end));
    box.append(rest);
    const cut = this.slice(text, Math.max(place, text.end));
    if (cut.trim()) box.append(make("span", "gx-cut", { title: "beyond the model's token limit" }, cut));
    const read = this.scene.models.some((model) => model.section === text.id || model.section === "both");
    const note = text.own ? "your text" : read ? "" : "no model was trained on it";
    return make("div", "", {}, make("h3", "", {}, text.name, note ? make("small", "", {}, ` ${note}`) : null), box);
  }

  truths() {
    if (!this.scene.truths.length) return null;
    const chips = this.scene.truths.map((truth, index) => make("button", "gx-chip", {
      type: "button", "data-truth": index, "aria-pressed": "false", title: "choose the words that name it, and score against it",
      onclick: () => this.chooseTruth(index),
    }, truth.label));
    return make("div", "gx-truths", {}, make("h3", "", {}, "Known regions"), ...chips);
  }

  ownPhrase() {
    if (!this.host.live) return make("p", "gx-note", {}, "A phrase of your own needs the notebook: there the model reads it.");
    const input = make("input", "", { type: "text", placeholder: "A phrase of your own, then Enter", "aria-label": "A phrase of your own", maxlength: 400 });
    const draw = (event) => {
      event.preventDefault();
      event.stopPropagation();
      if (!input.value.trim()) return;
      this.phraseRequested = true;
      this.request({ type: "phrase", text: input.value.trim() });
    };
    // JupyterLab keeps Enter from submitting a form, so it is read here
    input.addEventListener("keydown", (event) => { if (event.key === "Enter") draw(event); });
    return make("form", "gx-own", { onsubmit: draw }, input, make("button", "", { type: "submit" }, "Draw"));
  }

  // ----------------------------------------------------------------------------------------- what is chosen

  /** Characters [start, end) of a text; places count code points as in Python, while a string counts UTF-16 units. */
  slice(text, start, end) { return this.letters[text.id].slice(start, end).join(""); }

  text(unit) { return this.scene.texts.find((text) => text.id === unit.text); }

  unitWords(unit) {
    const text = this.text(unit);
    if (unit.type === "word") return [unit.index];
    if (unit.type === "phrase") return text.phrases[unit.index].words;
    return text.words.flatMap(([, , of], index) => (unit.type === "all" || of === unit.index ? [index] : []));
  }

  /** Place of a unit among the scores of its text: words, sentences, phrases, all. */
  unitPlace(unit) {
    const text = this.text(unit), words = text.words.length;
    return { word: unit.index, sentence: words + unit.index, phrase: words + text.sentences + unit.index, all: words + text.sentences + text.phrases.length }[unit.type];
  }

  unitName(unit) {
    const text = this.state.swap === "written" ? this.text(unit) : this.scene.texts.find((other) => other.id === this.text(unit).swap) ?? this.text(unit);
    const words = this.unitWords(unit);
    if (!words.length) return "";
    return this.slice(text, text.words[words[0]][0], text.words[words.at(-1)][1]);
  }

  pin(unit, { focus = false, quiet = false } = {}) {
    const again = !quiet && unit && JSON.stringify(unit) === JSON.stringify(this.state.unit);
    this.state.unit = again ? null : unit;
    this.state.hovered = null;
    if (this.state.unit) {
      const words = this.unitWords(unit), phrases = this.text(unit).phrases;
      const named = unit.type === "phrase" ? phrases[unit.index] : phrases.find((phrase) => words.some((word) => phrase.words.includes(word)));
      if (named) this.state.truth = named.truth;
      else if (this.state.truth < 0 || this.state.truth >= this.scene.truths.length) this.state.truth = this.scene.truths.length ? 0 : -1;
    }
    this.draw();
    if (focus && unit) this.words[unit.text][this.unitWords(unit)[0]].focus({ preventScroll: false });
    this.host.pick(this.state.unit ? { ...unit, words: this.unitName(unit) } : {});
  }

  hover(unit) {
    this.state.hovered = unit;
    this.draw();
  }

  set(key, value) {
    this.state[key] = value;
    if (key === "mode") {
      const unit = this.state.unit;
      if (unit && unit.type !== "all" && unit.type !== "phrase") {
        const word = this.unitWords(unit)[0], of = this.text(unit).words[word][2];
        this.state.unit = value === "sentence" && of >= 0 ? { text: unit.text, type: "sentence", index: of } : { text: unit.text, type: "word", index: word };
      }
    }
    for (const button of this.root.querySelectorAll(`[data-key="${key}"]`)) {
      if (button.matches("button")) button.setAttribute("aria-pressed", String(value));
      else for (const choice of button.children) choice.setAttribute("aria-pressed", String(choice.dataset.value === value));
    }
    this.draw();
  }

  choosePicture(number, what, value) {
    const before = this.choices[number];
    const name = this.scene.models[before.model].kinds[before.kind].name;
    this.choices[number] = { ...before, [what]: value };
    if (what === "model") this.choices[number].kind = this.kindIndex(value, name);
    this.pictures[number].setup(this.scene, this.photo, this.choices[number]);
    this.draw();
  }

  /** Choose the words that name a known region: in the chosen text, else in the last text that has any. */
  chooseTruth(index) {
    const place = (text) => text.phrases.findIndex((phrase) => phrase.truth === index);
    const current = this.state.unit && this.text(this.state.unit);
    const text = current && place(current) >= 0 ? current : this.texts.findLast((item) => place(item) >= 0);
    this.set("outlines", true);
    if (text) this.pin({ text: text.id, type: "phrase", index: place(text) }, { quiet: true });
    this.state.truth = index;
    this.draw();
  }

  // ------------------------------------------------------------------------------------------- what is shown

  /** The maps of a unit on one side: as written, swapped, and which of them (or their difference) is to be shown. */
  unitMap(number, unit) {
    const { model, kind } = this.choices[number];
    const text = this.text(unit), words = this.unitWords(unit);
    const block = (id) => this.blocks[`${model}/${id}`];
    const written = meanMap(block(text.id), kind, words);
    if (this.state.swap === "written" || !text.swap) return { shown: this.state.swap === "difference" ? null : written, block: block(text.id), text };
    const other = meanMap(block(text.swap), kind, words);
    const shown = this.state.swap === "swapped" ? other : written && other && other.map((value, i) => value - written[i]);
    return { shown, block: block(text.swap), text: this.scene.texts.find((item) => item.id === text.swap) };
  }

  draw() {
    const { state } = this, unit = state.hovered ?? state.unit;
    this.pictures.forEach((picture, number) => {
      if (!picture.size[0]) return;
      const choice = this.choices[number], kind = this.scene.models[choice.model].kinds[choice.kind];
      const first = Object.keys(this.blocks).find((key) => key.startsWith(`${choice.model}/`));
      const drawn = unit ? this.unitMap(number, unit) : { shown: null, block: this.blocks[first] };
      const difference = state.swap === "difference", signed = kind.signed || difference;
      const colours = state.colours === "auto" ? (signed ? "orange-purple" : "viridis") : state.colours;
      picture.layers[1].style.opacity = state.opacity;
      picture.show(drawn.shown, drawn.block.shape.slice(2), this.tables[colours], this.range(drawn, choice, signed, difference), unit ? this.unitName(unit) : "");
      picture.mark({ grid: state.grid, truth: state.truth, outlines: state.outlines, point: state.point });
      picture.score.replaceChildren(...this.score(number, unit, drawn.shown));
      picture.colours = colours;
    });
    this.highlight(unit);
    this.drawTopUnits();
    if (state.unit) this.spoken.textContent = this.pictures.map((picture) => picture.stage.getAttribute("aria-label")).join(" ");
  }

  range({ shown, block, text }, choice, signed, difference) {
    if (!shown) return [0, 1];
    if (this.state.range === "map" || difference) return limits([shown], signed);
    const every = text.words.map((_, word) => meanMap(block, choice.kind, [word])).filter(Boolean);
    return limits(every, signed);
  }

  /** The score line of one picture, as nodes. */
  score(number, unit, map) {
    const { state, scene } = this, choice = this.choices[number];
    if (!unit) return ["Choose a word of the report, or a place in the picture."];
    const bold = (text) => make("b", "", {}, text);
    const line = [bold(`“${this.unitName(unit)}” `)];
    const text = this.text(unit);
    if (state.swap !== "written" && !text.swap) return [...line, "This text names no side: there is nothing to exchange."];
    if (!map) return [...line, "has no map: it lies beyond the token limit, or the method leaves it out."];
    if (state.swap === "difference") {
      const size = map.reduce((sum, value) => sum + Math.abs(value), 0) / map.length;
      return [...line, `Change when left and right are exchanged: mean ${shortNumber(size)}, largest ${shortNumber(Math.max(...map.map(Math.abs)))}.`];
    }
    if (state.truth < 0) return scene.truths.length ? line : [...line, "No region is known for this image: no score."];
    const id = state.swap === "swapped" ? text.swap : text.id;
    const pair = scene.scores[`${choice.model}/${id}`][choice.kind][state.truth][this.unitPlace(unit)];
    const truth = scene.truths[state.truth];
    if (!pair || pair[1] === null) return [...line, `No score: ${truth.label} lies outside what the model saw.`];
    const [contrast, hit] = pair;
    const chance = truth.chance[choice.model];
    const game = hit === 1 ? "hit" : hit === 0 ? "miss" : `${(100 * hit).toFixed(0)} % (tie)`;
    line.push(`against ${truth.label}: CNR `, bold(withSign(contrast)), ", pointing game ", bold(game), chance === null ? "" : ` (chance ${(100 * chance).toFixed(0)} %)`);
    if (contrast < 0) line.push(make("em", "", {}, " Inverted: lower on the finding than elsewhere."));
    return line;
  }

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
        const read = swap || text;
        const shown = this.slice(read, ...read.words[index].slice(0, 2));
        if (word.textContent !== shown) word.textContent = shown;
        word.classList.toggle("gx-swapped", shown !== this.slice(text, ...text.words[index].slice(0, 2)));
      });
    }
    (stop ?? this.words[this.texts[0].id][0])?.setAttribute("tabindex", "0"); // one stop for Tab, arrows from there
    for (const chip of this.root.querySelectorAll(".gx-chip")) chip.setAttribute("aria-pressed", String(Number(chip.dataset.truth) === this.state.truth));
  }

  // ------------------------------------------------------------------------------- words of a place in the image

  choosePoint(x, y) {
    this.state.point = [x, y];
    this.draw();
  }

  /** The words (or sentences) with the highest value at the chosen region, best first. */
  topUnits(number) {
    const { model, kind } = this.choices[number], picture = this.pictures[number];
    const cell = this.state.point && picture.cell(...this.state.point);
    if (!cell) return [];
    const sentences = this.scene.models[model].kinds[kind].unit === "sentence" || this.state.mode === "sentence";
    const values = [];
    for (const text of this.texts) {
      const units = sentences ? [...Array(text.sentences).keys()].map((index) => ({ text: text.id, type: "sentence", index })) : text.words.map((_, index) => ({ text: text.id, type: "word", index }));
      for (const unit of units) {
        const map = this.unitMap(number, unit).shown;
        if (map) values.push({ unit, value: map[cell[0] * picture.grid[1] + cell[1]] });
      }
    }
    return values.sort((a, b) => b.value - a.value).slice(0, 8);
  }

  drawTopUnits() {
    const key = JSON.stringify([this.state.point, this.choices, this.state.mode, this.state.swap, this.texts.length, this.scene.title]);
    if (key === this.listed && this.top.childNodes.length) return; // a list made anew would lose the focus in it
    this.listed = key;
    for (const word of this.root.querySelectorAll(".gx-here")) word.classList.remove("gx-here");
    if (!this.state.point) { this.top.replaceChildren(); return; }
    const lists = this.pictures.map((picture, number) => {
      const best = this.topUnits(number);
      const top = Math.max(...best.map((item) => Math.abs(item.value)), 1e-12);
      if (number === 0) for (const { unit } of best.slice(0, 4)) for (const word of this.unitWords(unit)) this.words[unit.text][word].classList.add("gx-here");
      const rows = best.map(({ unit, value }) => make("li", "", {}, make("button", "", { type: "button", title: this.text(unit).name, onclick: () => this.pin(unit, { quiet: true }) },
        make("span", "gx-name", {}, this.unitName(unit)), make("span", "gx-amount", {}, shortNumber(value)), make("i", value < 0 ? "gx-minus" : "", { style: `width:${(100 * Math.abs(value)) / top}%` }))));
      return make("div", "", {}, make("h4", "", {}, `${picture.model.name}, ${picture.kind.name.replace("_", " ")}`), rows.length ? make("ol", "", {}, ...rows) : make("p", "gx-note", {}, "The model did not see this place."));
    });
    this.top.replaceChildren(make("h3", "", {}, "Highest words here"), make("div", "gx-columns", {}, ...lists));
  }

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
      Escape: () => { Object.assign(this.state, { unit: null, hovered: null, point: null }); this.draw(); this.host.pick({}); },
      Enter: () => event.target.matches(".gx-word") && event.target.click(),
      " ": () => event.target.matches(".gx-word") && event.target.click(),
    }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act || (event.target.matches("button") && (event.key === "Enter" || event.key === " "))) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  }

  /** To the next word or sentence, over the borders of texts. */
  step(by, sentence = this.state.mode === "sentence") {
    const every = this.texts.flatMap((text) => (sentence ? [...Array(text.sentences).keys()] : text.words).map((_, index) => ({ text: text.id, type: sentence ? "sentence" : "word", index })));
    if (!every.length) return;
    const unit = this.state.unit;
    const words = unit ? this.unitWords(unit) : [];
    const anchor = by > 0 ? words.at(-1) : words[0];
    const at = unit ? every.findIndex((item) => item.text === unit.text && (sentence ? item.index === this.text(unit).words[anchor][2] : item.index === anchor)) : by > 0 ? -1 : 0;
    this.pin(every[(at + by + every.length) % every.length], { focus: true, quiet: true });
  }

  // -------------------------------------------------------------------------------------- kernel and files

  request(message) {
    this.setStatus("Working …");
    this.host.send(message);
  }

  onMessage(message) {
    if (message.type === "error") { this.phraseRequested = false; this.setStatus(message.text, true); }
    if (message.type === "page") { save(new Blob([message.html], { type: "text/html" }), message.name); this.setStatus(`Saved ${message.name}.`); }
  }

  setStatus(text, bad = false) {
    this.status.textContent = text;
    this.status.classList.toggle("gx-bad", bad);
  }

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
      stops(this.tables[picture.colours]).forEach((colour, i, every) => bar.addColorStop(i / (every.length - 1), colour));
      const below = height + gap * 1.4;
      Object.assign(context, { globalAlpha: picture.map ? 1 : 0, fillStyle: bar });
      context.fillRect(left, below, width, 8 * ratio);
      Object.assign(context, { globalAlpha: 1, fillStyle: "#222", font: `${12 * ratio}px system-ui, sans-serif` });
      const ticks = picture.ticks.map((tick) => tick.textContent);
      const lines = [picture.map ? `${ticks[0]}  to  ${ticks[2]}` : "", `${picture.model.name}, ${picture.kind.name.replace("_", " ")}`, unit ? `“${this.unitName(unit)}”` : "", this.scene.title];
      lines.forEach((text, i) => context.fillText(text, left, below + (24 + 16 * i) * ratio, width));
    });
    canvas.toBlob((blob) => save(blob, `${this.scene.title.split(" ")[0] || "map"}.png`));
  }
}

const withSign = (value) => (value === null ? "∞" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`);

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
      listen(changed, onMessage) {
        model.on("change:revision", changed);
        model.on("msg:custom", onMessage);
        return () => { model.off("change:revision", changed); model.off("msg:custom", onMessage); };
      },
    });
    return () => explorer.close();
  },
};
