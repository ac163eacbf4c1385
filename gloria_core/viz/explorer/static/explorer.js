// The explorer: a report whose words draw their maps. One scene, some state, and what the reader does to it.
//
// `host`: { scene(), maps(), live, listen(changed, told), send(message), pick(selection) }. In a notebook it is the
// widget's kernel; in an exported page it is the page itself.

const KEYS = "Keys: ← → words · ↑ ↓ sentences · S sentence mode · G grid · T truth · W swap sides · Esc clear";

class Explorer {
  constructor(root, host) {
    Object.assign(this, { root, host });
    this.state = { mode: "word", colours: "auto", opacity: 0.6, range: "map", grid: false, outlines: true, swap: "written", truth: -1, unit: null, over: null, spot: null };
    root.classList.add("gx");
    root.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's own keys stay out of here
    root.setAttribute("tabindex", "-1");
    root.addEventListener("keydown", (event) => this.key(event));
    this.theme();
    this.watch = new ResizeObserver(() => { if (this.pictures?.some((picture) => picture.resize())) this.draw(); });
    this.watch.observe(root);
    this.leave = host.listen(() => this.load(), (message) => this.told(message));
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
    this.texts = scene.texts.filter((text) => !text.hidden && text.words.length);
    if (!same || !this.sides) this.sides = this.firstSides();
    this.build(photo);
    const own = this.asked && this.texts.findLast((text) => text.own);
    this.asked = false;
    const first = own ? { text: own.id, type: "all", index: 0 } : same ? this.state.unit : this.firstUnit();
    this.pin(first, { quiet: true });
    this.say("");
  }

  firstSides() {
    const kind = (model, name) => Math.max(0, this.scene.models[model].kinds.findIndex((item) => item.name === name));
    if (this.scene.models.length > 1) return [{ model: 0, kind: kind(0, "cosine") }, { model: 1, kind: kind(1, "cosine") }];
    return [{ model: 0, kind: kind(0, "attention") }, { model: 0, kind: kind(0, "cosine") }];
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
    this.here = make("div", "gx-here-list");
    this.pictures = this.sides.map((_, number) => new Picture(number, {
      choose: (what, value) => this.chooseSide(number, what, value),
      look: (x, y) => this.look(x, y),
    }));
    this.root.replaceChildren(
      this.header(), this.toolbar(),
      make("div", "gx-body", {},
        make("section", "gx-report", { "aria-label": "Report" }, ...this.texts.map((text) => this.paragraph(text)), this.truths(), this.ownPhrase()),
        make("div", "gx-right", {}, make("div", "gx-pictures", {}, ...this.pictures.map((picture) => picture.element)), this.here)),
      make("footer", "gx-foot", {}, KEYS), this.status, this.spoken);
    this.setupPictures();
  }

  setupPictures() {
    this.pictures.forEach((picture, number) => picture.setup(this.scene, this.photo, this.sides[number]));
  }

  header() {
    const studies = this.host.live ? this.scene.studies ?? [] : [];
    const pick = studies.length > 1 && select("Study", studies.map((id) => [id, id]), this.scene.study, (id) => this.ask({ type: "study", id }));
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
      group("Sides", radio("swap", "Left and right in the text", [["written", "As written", "the text as it stands"], ["swapped", "Swapped", "left and right exchanged in the text, which is then encoded anew (W)"], ["difference", "Difference", "swapped minus as written"]])),
      field("Colours", select("Colour map", colours, state.colours, (value) => this.set("colours", value))),
      field("Range", select("Range of the colours", [["map", "this map"], ["text", "all words"]], state.range, (value) => this.set("range", value))),
      field("Opacity", slider),
      group("Show", make("div", "gx-buttons", {}, toggle("grid", "Grid", "the model's regions (G)"), this.scene.truths.length ? toggle("outlines", "Truth", "known regions (T)") : null)),
      group("Save", make("div", "gx-buttons", {},
        make("button", "gx-png", { type: "button", title: "the pictures as they are now", onclick: () => this.savePicture() }, "PNG"),
        this.host.live ? make("button", "gx-page", { type: "button", title: "a page that works without a kernel and without a network", onclick: () => this.ask({ type: "export" }) }, "Page") : null)));
  }

  paragraph(text) {
    const box = make("p", "gx-text", { "data-text": text.id });
    const spans = (this.words[text.id] = []);
    let place = 0, sentence = null, current = -1;
    text.words.forEach(([start, end, of], index) => {
      if (of !== current || !sentence) {
        box.append(text.text.slice(place, start));
        sentence = make("span", "gx-sentence");
        box.append(sentence);
        current = of;
      } else sentence.append(text.text.slice(place, start));
      const unit = () => (this.state.mode === "sentence" && of >= 0 ? { text: text.id, type: "sentence", index: of } : { text: text.id, type: "word", index });
      const word = make("span", "gx-word", {
        role: "button", tabindex: -1, "aria-pressed": "false", "data-word": index,
        onclick: () => this.pin(unit()), onpointerenter: () => this.hover(unit()), onpointerleave: () => this.hover(null),
      }, text.text.slice(start, end));
      if (text.phrases.some((phrase) => phrase.words.includes(index))) word.classList.add("gx-named");
      spans.push(word);
      sentence.append(word);
      place = end;
    });
    const rest = text.text.slice(place, Math.max(place, text.end));
    box.append(rest);
    const cut = text.text.slice(Math.max(place, text.end));
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
      this.asked = true;
      this.ask({ type: "phrase", text: input.value.trim() });
    };
    // JupyterLab keeps Enter from submitting a form, so it is read here
    input.addEventListener("keydown", (event) => { if (event.key === "Enter") draw(event); });
    return make("form", "gx-own", { onsubmit: draw }, input, make("button", "", { type: "submit" }, "Draw"));
  }

  // ----------------------------------------------------------------------------------------- what is chosen

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
    return text.text.slice(text.words[words[0]][0], text.words[words.at(-1)][1]);
  }

  pin(unit, { focus = false, quiet = false } = {}) {
    const again = !quiet && unit && JSON.stringify(unit) === JSON.stringify(this.state.unit);
    this.state.unit = again ? null : unit;
    this.state.over = null;
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
    this.state.over = unit;
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

  chooseSide(number, what, value) {
    const before = this.sides[number];
    const name = this.scene.models[before.model].kinds[before.kind].name;
    this.sides[number] = { ...before, [what]: value };
    if (what === "model") this.sides[number].kind = Math.max(0, this.scene.models[value].kinds.findIndex((kind) => kind.name === name));
    this.pictures[number].setup(this.scene, this.photo, this.sides[number]);
    this.draw();
  }

  chooseTruth(index) {
    const unit = this.state.unit;
    const here = unit && this.text(unit).phrases.findIndex((phrase) => phrase.truth === index);
    const text = here >= 0 && unit ? this.text(unit) : this.texts.findLast((item) => item.phrases.some((phrase) => phrase.truth === index));
    this.state.outlines = true;
    this.set("outlines", true);
    if (text) this.pin({ text: text.id, type: "phrase", index: text.phrases.findIndex((phrase) => phrase.truth === index) }, { quiet: true });
    this.state.truth = index;
    this.draw();
  }
}
