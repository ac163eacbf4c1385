"""Object-CXR (JF Healthcare, MIDL 2020, https://github.com/hlk-1135/object-CXR): foreign objects on radiographs.

Read are `train.csv` and `dev.csv` (image_path or image_name, annotation) with image folders `train/` and `dev/`, as
shipped: 8,000 and 1,000 images, half of them with objects. An annotation is shapes with ";" between them, each
"type x1 y1 x2 y2 ...": 0 rectangle, 1 ellipse (both by their corners), 2 polygon (its points).
"""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from gloria_core.data import raw_folder as raw
from gloria_core.data.annotations import write_mask
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.splits import random_split

LABEL = "Foreign Object"
MASKS = "masks_object_cxr"
HOW = "github.com/hlk-1135/object-CXR (link to the archive there)"
TABLES = {"train.csv": "train", "dev.csv": "test"}

NEEDS = {name: f"the shapes of the {split} images; {HOW}" for name, split in TABLES.items()}

Shape = tuple[int, list[float]]


def prepare(
    root: Path,
    *,
    split_rule: raw.SplitRule = "patient",
    masks: bool = False,
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest: one study an image, label and boxes "Foreign Object", boxes in pixels of the file.

    A box holds its shape, whatever its type. (MGCA draws a symmetric box round the visual centre of a polygon's
    buffered outline; its detection numbers are on those boxes.)
    split_rule: test is `dev.csv`, as in the papers, for the contest's test labels are not public. "patient" draws an
        eighth of `train.csv` as valid, stratified; "published" MGCA's tenth: 7,200 / 800 / 1,000. The owner names no
        patients; each image is one.
    masks: also write the shapes to `masks_object_cxr/*.png` below the root, all of an image in one mask.
    on_error="exclude" leaves out images that are not there and lists them in `attrs["excluded"]`.
    """
    folder = raw.RawFolder(root, "object_cxr")
    paths = folder.require(NEEDS)
    parts = zip(paths, TABLES.items(), strict=True)
    table = pd.concat([_read(path, folder, name[:-4]).assign(split=split) for path, (name, split) in parts])
    if split_rule == "published":
        train = (table["split"] == "train").to_numpy()
        table.loc[train, "split"] = random_split(int(train.sum()), held_out=0.1)
    rows = raw.Rows(table, source=" and ".join(map(str, paths)), cell=("image_path", "cell"))
    rows.exclude_missing(table["images"] != "", on_error)
    table = rows.table
    if masks:
        table["masks"] = raw.mask_cells(LABEL, _masks(table, folder))
    boxes = [[{"label": LABEL, "xywh": _box(numbers)} for _, numbers in part] for part in table["shapes"]]
    table["boxes"] = [raw.cell(part) for part in boxes]
    table[LABEL] = (table["boxes"] != "").astype(float)
    return raw.finish(folder, rows, [LABEL], seed=seed, draw="valid" if split_rule == "patient" else "")


def _read(path: Path, folder: raw.RawFolder, home: str) -> pd.DataFrame:
    """study_id, images (path below the root, "" without a file), cell, shapes."""
    column = next(iter(raw.columns_of(path, ["image_name", "image_path"])), "image_path")
    table = raw.read_table(path, {column: "cell", "annotation": "annotation"})
    # the owner's paths begin with a folder of theirs; the file's name says which image it is
    names = table["cell"].str.replace(r"^/path/", "", regex=True)
    raw.check_paths(path, column, names)
    names = names.str.rpartition("/")[2]
    raw.check_cells(path, column, names, ~names.duplicated(), "the image occurs twice; keep one row of it")
    shapes = [_shapes(text, path, row + 2) for row, text in table["annotation"].items()]
    images = folder.first_existing([names, f"{home}/" + names])
    drawn = pd.DataFrame({"image": images, "shape": shapes}).explode("shape").dropna()
    sizes = folder.sizes(drawn["image"])
    drawn = drawn[drawn["image"].map(sizes).notna()]
    boxes = pd.DataFrame([_box(numbers) for _, numbers in drawn["shape"]], drawn.index, columns=[*"xywh"])
    width, height = (drawn["image"].map(lambda image, side=side: sizes[image][side]) for side in (0, 1))
    raw.check_inside(path, boxes, width, height)
    return table.assign(study_id=f"{home}-" + names.str.rpartition(".")[0], images=images, shapes=shapes)


def _shapes(text: str, path: Path, row: int) -> list[Shape]:
    """The shapes of one cell. Raises ManifestError for what is none."""
    shapes = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        try:
            kind, *numbers = part.split()
            kind, numbers = int(kind), [float(number) for number in numbers]
        except ValueError:
            kind, numbers = -1, []
        good = (kind in (0, 1) and len(numbers) == 4) or (kind == 2 and len(numbers) >= 6 and len(numbers) % 2 == 0)
        if not good or not np.isfinite(numbers).all() or min(_box(numbers)[2:]) <= 0:
            raise ManifestError(
                f"{path}, row {row}, column 'annotation': {part[:60]!r} is no shape; shapes are '0 x1 y1 x2 y2' "
                "(rectangle), 1 (ellipse) or '2 x1 y1 x2 y2 x3 y3 ...' (polygon)"
            )
        shapes.append((kind, numbers))
    return shapes


def _box(numbers: list[float]) -> list[float]:
    """[x, y, width, height] round the points x1 y1 x2 y2 ..."""
    x, y = min(numbers[::2]), min(numbers[1::2])
    return [x, y, round(max(numbers[::2]) - x, 3), round(max(numbers[1::2]) - y, 3)]


def _masks(table: pd.DataFrame, folder: raw.RawFolder) -> list[str]:
    """The path of each image's mask, "" for an image without shapes."""
    root, sizes = folder.root, folder.sizes(table.loc[table["shapes"].map(len) > 0, "images"])
    paths = []
    for study, image, shapes in zip(table["study_id"], table["images"], table["shapes"], strict=True):
        size = sizes.get(image)
        if shapes and size is None:
            raise ManifestError(f"{root / image} cannot be read, so its mask has no size; copy it again")
        name = f"{MASKS}/{study}.png"
        paths.append(write_mask(root, name, lambda size=size, part=shapes: filled(part, size)) if shapes else "")
    return paths


def filled(shapes: list[Shape], size: tuple[int, int]) -> np.ndarray:
    """The pixels of shapes in an image of `size` (width, height). Shape: (height, width) bool."""
    canvas = Image.new("1", size)
    draw = ImageDraw.Draw(canvas)
    for kind, numbers in shapes:
        corners = [min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])]
        if kind == 2:
            draw.polygon(numbers, fill=1)
        else:
            (draw.ellipse if kind == 1 else draw.rectangle)(corners, fill=1)
    return np.array(canvas)
