// Numbers only: rows of maps to one map, one map to coloured pixels. Nothing here knows the page.
//
// A block holds the maps of one text by one model: `data` Float32Array of shape [K, W, h, w], NaN where a word has none.

/** Bytes of little-endian float32, as base64 text or as a DataView, to a Float32Array. */
export function floats(source) {
  const bytes = typeof source === "string" ? fromBase64(source) : new Uint8Array(source.buffer, source.byteOffset, source.byteLength);
  const copy = bytes.slice(); // a view may begin at any byte, and a Float32Array may not
  return new Float32Array(copy.buffer);
}

export function fromBase64(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

/** Mean map (h * w) over the words that have one; null where none has. */
export function meanMap(block, kind, words) {
  const [, count, h, w] = block.shape;
  const cells = h * w;
  const sum = new Float64Array(cells);
  let known = 0;
  for (const word of words) {
    const start = (kind * count + word) * cells;
    if (Number.isNaN(block.data[start])) continue;
    known += 1;
    for (let i = 0; i < cells; i++) sum[i] += block.data[start + i];
  }
  return known ? sum.map((value) => value / known) : null;
}

/** Lowest and highest value of a map, or of several; symmetric about zero for maps with a sign. */
export function limits(maps, signed) {
  let low = Infinity, high = -Infinity;
  for (const map of maps) {
    for (const value of map) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (low > high) return [0, 1];
  if (!signed) return [low, high];
  const reach = Math.max(Math.abs(low), Math.abs(high), 1e-12);
  return [-reach, reach];
}

/**
 * Where the `count` pixels of one canvas axis lie on a map. The axis shows `size` pixels of the file; the map's `cells`
 * tile the pixels from `start` to `start + length`. Linear between cell centres, held at the outermost ones.
 */
export function axis(count, size, start, length, cells) {
  const low = new Int32Array(count), high = new Int32Array(count), part = new Float64Array(count);
  const inside = new Uint8Array(count), cell = new Int32Array(count);
  for (let i = 0; i < count; i++) {
    const position = ((((i + 0.5) * size) / count - start) / length) * cells;
    inside[i] = position >= 0 && position < cells ? 1 : 0;
    const place = Math.min(Math.max(position - 0.5, 0), cells - 1);
    low[i] = Math.floor(place);
    high[i] = Math.min(low[i] + 1, cells - 1);
    part[i] = place - low[i];
    cell[i] = Math.min(Math.max(Math.floor(position), 0), cells - 1);
  }
  return { low, high, part, inside, cell };
}

/** The value at one canvas pixel; null outside what the model saw. */
export function valueAt(map, w, across, down, column, row) {
  if (!across.inside[column] || !down.inside[row]) return null;
  const top = down.low[row] * w, bottom = down.high[row] * w;
  const l = across.low[column], r = across.high[column], p = across.part[column], q = down.part[row];
  return (map[top + l] * (1 - p) + map[top + r] * p) * (1 - q) + (map[bottom + l] * (1 - p) + map[bottom + r] * p) * q;
}

/** Colours `pixels` (Uint32Array, one a canvas pixel); those outside what the model saw stay transparent. */
export function paint(pixels, map, w, across, down, table, [low, high]) {
  const width = across.low.length, height = down.low.length;
  const scale = high > low ? 256 / (high - low) : 0;
  const line = new Float64Array(w);
  pixels.fill(0);
  for (let row = 0; row < height; row++) {
    if (!down.inside[row]) continue;
    const top = down.low[row] * w, bottom = down.high[row] * w, q = down.part[row];
    for (let i = 0; i < w; i++) line[i] = (map[top + i] * (1 - q) + map[bottom + i] * q - low) * scale;
    const start = row * width;
    for (let column = 0; column < width; column++) {
      if (!across.inside[column]) continue;
      const p = across.part[column];
      const index = (line[across.low[column]] * (1 - p) + line[across.high[column]] * p) | 0;
      pixels[start + column] = table[index < 0 ? 0 : index > 255 ? 255 : index];
    }
  }
}

/** 256 colours of three bytes (base64) as little-endian RGBA words. */
export function colourTable(text) {
  const bytes = fromBase64(text);
  const table = new Uint32Array(256);
  for (let i = 0; i < 256; i++) table[i] = 0xff000000 + (bytes[3 * i + 2] << 16) + (bytes[3 * i + 1] << 8) + bytes[3 * i];
  return table;
}

/** 17 evenly spaced colours of a table, from low to high, as CSS. */
export function stops(table) {
  return Array.from({ length: 17 }, (_, i) => {
    const colour = table[Math.min(255, i * 16)];
    return `rgb(${colour & 255} ${(colour >> 8) & 255} ${(colour >> 16) & 255})`;
  });
}

/** Short text of a number, with a true minus sign. */
export function shortNumber(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  const text = size < 0.001 || size >= 1e5 ? size.toExponential(1) : size.toPrecision(digits);
  return (value < 0 ? "−" : "") + text;
}
