"""NIH ChestX-ray14 (Wang et al. 2017, https://arxiv.org/abs/1705.02315): 112,120 frontal images of 30,805 patients.

Reads the official layout (`Data_Entry_2017*.csv`, `BBox_List_2017.csv`, `images/` or `images_001/images/` ...) and
smaller copies of it whose images have another suffix and size. NIH publishes labels and no reports, so text is made
from labels by prompts, in the way of CXR-CLIP (You et al. 2023, https://arxiv.org/abs/2310.13292):
`impression` says the findings, `findings` holds one sentence on the projection and nothing else.
"""

from pathlib import Path

import pandas as pd

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import OnError, raise_failures
from gloria_core.data.prompts import PromptSet, load_prompts, zero_shot_prompts
from gloria_core.data.sources import vocabulary
from gloria_core.data.splits import assign_splits

NIH_LABELS = tuple(vocabulary("nih", "labels"))
NO_FINDING = "No Finding"
LABELS = (*NIH_LABELS, NO_FINDING)
TABLE = "Data_Entry_2017*.csv"
NEEDS = {TABLE: "the labels, from https://nihcc.app.box.com/v/ChestXray-NIHCC"}
BOXES = "BBox_List*.csv"
LISTS = {"train_val_list.txt": "train", "test_list.txt": "test"}


def read_entries(path: Path) -> pd.DataFrame:
    """One row an image: study_id (the stem), patient_id, labels (a set), age (years), sex, view."""
    columns = {
        "Image Index": raw.Column("image", unique=True),
        "Finding Labels": "labels",
        "Follow-up #": "follow_up",
        "Patient ID": raw.Column("patient_id", filled=True, remedy="give every image its patient"),
        "Patient Age": raw.Column(
            "age", pattern=r"\d+[YMD]?", remedy="an age is a number of years, or like 058Y, 011M, 020D"
        ),
        "Patient Gender": raw.Column("sex", values=["M", "F"]),
        "View Position": raw.Column("view", values=["PA", "AP"]),
    }
    table = raw.read_table(path, columns, remedy="Give the table the names of the 2017 release")
    table["study_id"] = table["image"].str.rsplit(".", n=1).str[0]
    cells = table["labels"]
    table["labels"] = cells.str.split("|").map(frozenset)
    known = table["labels"].map(lambda names: names <= {*LABELS})
    raw.check_cells(path, "Finding Labels", cells, known, f"labels are {', '.join(LABELS)}, joined by |")
    alone = table["labels"].map(lambda names: NO_FINDING not in names or len(names) == 1)
    raw.check_cells(path, "Finding Labels", cells, alone, f"{NO_FINDING!r} must stand alone")
    parts = table["age"].str.extract(r"(\d+)([YMD]?)")
    table["age"] = (parts[0].astype(int) // parts[1].map({"": 1, "Y": 1, "M": 12, "D": 365})).astype(str)
    return table


def read_boxes(path: Path) -> pd.DataFrame:
    """One row a box: image, study_id, label (NIH's 'Infiltrate' spelt as in the entries), x, y, w, h in pixels."""
    # the header's "Bbox [x,y,w,h]" holds commas, so it is read as four columns
    numbers = {"Bbox [x": "x", "y": "y", "w": "w", "h]": "h"}
    names = {**{name: name for name in NIH_LABELS}, "Infiltrate": "Infiltration"}
    label = raw.Column("label", values=names, remedy="use the labels of the entries")
    table = raw.read_table(path, {"Image Index": "image", "Finding Label": label, **numbers})
    table["study_id"] = table["image"].str.rsplit(".", n=1).str[0]
    return raw.check_boxes(path, table, {f"Bbox {name}": name for name in numbers.values()}, side=raw.ORIGINAL_SIDE)


def read_extra(folder: raw.RawFolder, name: str, value: str, images: pd.Series) -> pd.Series | None:
    """The column `value` of an optional table by `image_index`, for each of the images; None without the table."""
    path = folder.optional(name)
    if path is None:
        return None
    table = raw.read_table(path, {"image_index": "image", value: "value"})
    return images.map(dict(zip(table["image"], table["value"], strict=True))).fillna("")


def prepare(
    root: Path,
    *,
    split_rule: raw.SplitRule = "patient",
    seed: int = 0,
    on_error: OnError = "raise",
    prompts: PromptSet | None = None,
    text_seed: int = 0,
    n_negative: int = 3,
) -> pd.DataFrame:
    """The checked manifest of the dataset under `root`, with splits, label ranks and texts; one study an image.

    split_rule: "patient" draws 70/10/20 % of the images, patient-disjoint and stratified, with `seed`, and then puts
        every patient who has boxes into test (1 % of the patients; the owner's lists have them there, too); "published"
        takes test_list.txt as test and draws an eighth of train_val_list.txt as valid, patient-disjoint.
    on_error: "exclude" leaves out listed images that are not there (and boxes that cannot be placed) and lists them
        in `attrs["excluded"]` by the row of their table; "raise" counts and names them.
    prompts: sentences to make texts from; the package's "nih" by default. Training texts are drawn with `text_seed`,
        each study's on its own, with `n_negative` absent findings (3 in CXR-CLIP's runs); valid and test texts are
        the first sentences, without negatives.
    Boxes are in pixels of the image file that is there: the table's numbers (1024-pixel originals) times width / 1024
        and height / 1024. Without a box table there are no boxes.
    """
    folder = raw.RawFolder(root, "nih")
    (path,) = folder.require(NEEDS)
    rows = raw.Rows(read_entries(path), source=path, cell=("Image Index", "image"))
    homes = sorted(home.name for home in root.glob("images*") if home.is_dir())
    homes += [f"{name}/images" for name in homes]
    rows.table["images"] = folder.locate(rows.table["study_id"], homes, raw.PICTURES)
    listed = set(rows.table["study_id"])
    rows.exclude_missing(rows.table["images"] != "", on_error, reason="listed, but no such image in images*/")
    if (boxes := folder.optional(BOXES, without="boxes")) is not None:
        marked = raw.Rows(read_boxes(boxes), source=boxes, cell=("Image Index", "image"))
        marked.exclude(
            ~marked.table["study_id"].isin(listed), "its image is not in the table of entries; remove the box"
        )
        if on_error == "raise":
            raise_failures(marked.failures, source=str(boxes))
        rows.failures += marked.failures
        rows.place_boxes(marked.table, folder, on_error)
    table = rows.table
    labels = {name: table["labels"].map(lambda names, name=name: float(name in names)) for name in LABELS}
    metadata = {f"meta_{name}": table[name] for name in ("age", "sex", "view", "follow_up")}
    view, sex = table["view"], table["sex"]
    table = table.assign(**labels, is_ap_view=raw.ap_view(view), is_male=raw.male(sex), views=view, **metadata)
    extras = {"meta_source": ("image_source.csv", "source"), "meta_rsna_class": ("rsna_to_nih.csv", "rsna_class")}
    for name, (file, value) in extras.items():
        if (cells := read_extra(folder, file, value, table["image"])) is not None:
            table[name] = cells
    moved, labels = 0, [*LABELS, "is_ap_view", "is_male"]
    frame = raw.manifest_frame(table, labels)
    if split_rule == "published":
        frame = raw.draw_valid(frame.assign(split=_published_split(folder, path, table["image"]).to_numpy()), seed=seed)
    else:
        frame = assign_splits(frame, seed=seed)
        # a box is truth for maps and detectors, and truth is for testing; the owner's list does the same
        boxed = frame["patient_id"].isin(frame.loc[frame["boxes"] != "", "patient_id"])
        moved = frame.loc[boxed & (frame["split"] != "test"), "patient_id"].nunique()
        frame["split"] = frame["split"].mask(boxed, "test")
    rows.table = _add_texts(frame, prompts or load_prompts("nih"), seed=text_seed, n_negative=n_negative)
    frame = raw.finish(folder, rows, labels, seed=seed)
    frame.attrs["moved_to_test"] = moved
    return frame


def _published_split(folder: raw.RawFolder, table: Path, images: pd.Series) -> pd.Series:
    """ "train" or "test" for each image by the lists of NIH; ManifestError where a list or an image is missing."""
    needs = dict.fromkeys(LISTS, "needed by split_rule='published'; get it from NIH, or use 'patient'")
    split = {}
    for path, name in zip(folder.require(needs), LISTS.values(), strict=True):
        split |= dict.fromkeys(raw.read_text(path)[0].split(), name)
    remedy = f"in neither {' nor '.join(LISTS)}; get the complete lists or use split_rule='patient'"
    raw.check_cells(table, "Image Index", images, images.isin(split), remedy)
    return images.map(split)


def _add_texts(frame: pd.DataFrame, prompts: PromptSet, *, seed: int, n_negative: int) -> pd.DataFrame:
    """The frame whose `impression` says its labels and whose `findings` says its view, drawn for training studies."""
    views = {kind: zero_shot_prompts(prompts, "is_ap_view", kind=kind) for kind in ("pos", "neg")}
    findings, impressions = [], []
    texts = raw.label_texts(frame, LABELS, prompts, seed=seed, n_negative=n_negative)
    for ap, (impression, rng) in zip(frame["is_ap_view"], texts, strict=True):
        choices = views["pos" if ap == 1 else "neg"]
        impressions.append(impression)
        findings.append(choices[0 if rng is None else int(rng.integers(len(choices)))])
    return frame.assign(findings=findings, impression=impressions)
