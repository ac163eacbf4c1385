"""Every adapter, on simulated raw folders: tables in any form, what is missing or too much, images of another size."""

import gzip
import io
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from gloria_core.data.images import read_gray
from gloria_core.data.manifest import ManifestError, boxes_of, masks_of
from gloria_core.data.sources import prepare
from gloria_core.phantom.raw_folders import WRITERS, write

OPTIONS = {"chexpert": {"hold_out": ""}, "chexpert_5x200": {"per_class": 2}, "own_csv": {"labels": ["Effusion"]}}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Callable[[str], Path]:
    """The simulated folder of a dataset, written once."""
    made = tmp_path_factory.mktemp("raw")

    def folder(dataset: str) -> Path:
        size = {"n_studies": 80 if dataset == "chexpert_5x200" else 24, "size": 64}
        return made / dataset if (made / dataset).is_dir() else write(dataset, made / dataset, **size)

    return folder


@pytest.fixture
def copied(simulated, tmp_path) -> Callable[[str], Path]:
    """A copy of it that may be changed."""
    return lambda dataset: shutil.copytree(simulated(dataset), tmp_path / "root")


def prepared(dataset: str, root: Path, **options: object) -> tuple[pd.DataFrame, list[str]]:
    """The manifest, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        frame = prepare(dataset, root, OPTIONS.get(dataset, {}) | options)
    return frame, [str(warning.message) for warning in said]


def refusal(dataset: str, root: Path, **options: object) -> str:
    with pytest.raises(ManifestError) as caught:
        prepared(dataset, root, **options)
    return str(caught.value)


# --- tables ----------------------------------------------------------------------------------------------------------

TABLES = [
    ("nih", "Data_Entry_2017.csv"), ("nih", "BBox_List_2017.csv"), ("nih", "test_list.txt"),
    ("covidx", "test_COVIDx9A.txt"), ("chexpert_plus", "chexbert_labels/impression_fixed.json"),
    ("object_cxr", "dev.csv"), ("vindr_cxr", "annotations/image_labels_train.csv"),
    ("rsna_pneumonia", "stage_2_detailed_class_info.csv"), ("siim_pneumothorax", "train-rle.csv"),
    ("cgmh", "test.csv"), ("openi", "indiana_projections.csv"), ("oxford_pet", "annotations/test.txt"),
]  # fmt: skip


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("table.csv", content)
    return buffer.getvalue()


FORMS = {
    "utf-16": ("{}", lambda content: content.decode().encode("utf-16")),
    "mark": ("{}", lambda content: content.decode().encode("utf-8-sig")),
    "gz": ("{}.gz", gzip.compress),
    "zip": ("{}.zip", zipped),
    "header": ("{}", lambda content: b", ".join(content.partition(b"\n")[0].upper().split(b",")) + b"\n"
               + content.partition(b"\n")[2]),
}  # fmt: skip


@pytest.mark.parametrize(("dataset", "table"), TABLES)
@pytest.mark.parametrize("form", FORMS)
def test_a_table_in_another_form_gives_the_same_manifest(simulated, copied, dataset, table, form):
    if form == "header" and not table.endswith(".csv"):
        pytest.skip("a list has no header")
    root, options = copied(dataset), {"split_rule": "published"} if dataset == "nih" else {}
    name, change = FORMS[form]
    content = (root / table).read_bytes()
    (root / table).unlink()
    (root / name.format(table)).write_bytes(change(content))
    frame, said = prepared(dataset, root, **options)
    pd.testing.assert_frame_equal(frame, prepared(dataset, simulated(dataset), **options)[0])
    assert not any("is not" in text for text in said)


@pytest.mark.parametrize(("dataset", "table"), TABLES)
def test_two_tables_where_one_is_expected_and_an_empty_one(copied, dataset, table):
    root, options = copied(dataset), {"split_rule": "published"} if dataset == "nih" else {}
    content = (root / table).read_bytes()
    (root / f"{table}.gz").write_bytes(gzip.compress(content))
    text = refusal(dataset, root, **options)
    assert "several files" in text and f"{table}, {table}.gz; keep or name one of them" in text
    (root / f"{table}.gz").unlink()
    (root / table).write_bytes(content.partition(b"\n")[0] + b"\n" if table.endswith(".csv") else b"")
    assert Path(table).name in refusal(dataset, root, **options)


@pytest.mark.parametrize(
    ("dataset", "table", "missing"),
    [
        ("nih", "BBox_List_2017.csv", "no boxes"),
        ("chexpert_plus", "chexbert_labels/impression_fixed.json", "no labels"),
        ("rsna_pneumonia", "stage_2_detailed_class_info.csv", "no classes"),
        ("openi", "indiana_projections.csv", "no projections by people"),
    ],
)
def test_an_optional_table_that_is_absent_is_said_once_and_a_near_one_is_named(copied, dataset, table, missing):
    root = copied(dataset)
    path = root / table
    path.rename(path.with_stem(f"my_{path.stem}"))
    options = {"views": "all"} if dataset == "openi" else {}
    _, said = prepared(dataset, root, **options)
    assert sum(f"my_{path.name} is not read" in text for text in said) == 1
    path.with_stem(f"my_{path.stem}").unlink()
    _, said = prepared(dataset, root, **options)
    assert sum(missing in text for text in said) == 1


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", sorted(set(WRITERS) - {"kermany", "montgomery_shenzhen"}))
def test_missing_and_unnamed_images(copied, dataset):
    """Kermany's, Montgomery's and Shenzhen's folders are their tables."""
    root = copied(dataset)
    whole, said = prepared(dataset, root)
    assert not any("in no row" in text for text in said)
    first = root / whole["images"].iloc[0].split(";")[0]
    first.rename(first.with_stem(f"{first.stem}9"))
    text = refusal(dataset, root)
    assert "row " in text and first.stem in text and "on_error='exclude'" in text
    frame, said = prepared(dataset, root, on_error="exclude")
    assert len(frame) < len(whole) or frame["images"].iloc[0] != whole["images"].iloc[0]
    assert any(first.stem in entry["reason"] for entry in frame.attrs["excluded"])
    counted = [text for text in said if "1 images are in no row of" in text and f"{first.stem}9" in text]
    assert len(counted) == (dataset not in ("chexpert_5x200", "ms_cxr")), "these two are parts of larger sets"


@pytest.mark.parametrize("dataset", ["kermany", "montgomery_shenzhen", "oxford_pet", "nih", "openi"])
def test_hidden_files_are_no_images(copied, dataset):
    """macOS leaves "._name.png" beside "name.png" in archives and on network disks."""
    root = copied(dataset)
    whole, said = prepared(dataset, root)
    for cell in whole["images"].head(3):
        (root / cell).with_name(f"._{Path(cell).name}").write_bytes(b"a resource fork")
    frame, now = prepared(dataset, root)
    pd.testing.assert_frame_equal(frame, whole)
    assert now == said


@pytest.mark.parametrize("dataset", sorted(WRITERS))
def test_a_wrong_folder(tmp_path, dataset):
    assert "is not a folder" in refusal(dataset, tmp_path / "nowhere")
    assert f"{tmp_path} lacks" in refusal(dataset, tmp_path)
    with pytest.raises(TypeError, match="no option 'splits'"):
        prepare(dataset, tmp_path, {"splits": 1})
    with pytest.raises(ValueError, match="Input should be 'raise' or 'exclude'"):
        prepare(dataset, tmp_path, {"on_error": "skip"})


def halve(root: Path, frame: pd.DataFrame) -> None:
    """Every image as a PNG of half its size (JPEG where it was one), as people keep copies."""
    for cell in frame["images"]:
        path = root / cell.split(";")[0]
        image = Image.fromarray(read_gray(path))
        if path.suffix in (".dcm", ".dicom"):
            path.unlink()
            path = path.with_suffix(".png")
        image.resize((image.width // 2, image.height // 2)).save(path)


@pytest.mark.parametrize("dataset", ["nih", "rsna_sample", "rsna_pneumonia", "covid_pairs", "ms_cxr"])
def test_boxes_are_scaled_where_the_size_of_the_original_is_known(copied, dataset):
    root = copied(dataset)
    before = prepared(dataset, root)[0]
    halve(root, before)
    after = prepared(dataset, root)[0]
    pairs = [(boxes_of(a), boxes_of(b)) for a, b in zip(*(f.to_dict("records") for f in (before, after)), strict=True)]
    assert sum(map(len, after["boxes"])) and any(old for old, _ in pairs)
    for old, new in pairs:
        assert [[value / 2 for value in box["xywh"]] for box in old] == [box["xywh"] for box in new]


@pytest.mark.parametrize("dataset", ["vindr_cxr", "object_cxr"])
def test_boxes_are_refused_where_it_is_not(copied, dataset):
    root = copied(dataset)
    before = prepared(dataset, root)[0]
    halve(root, before)
    assert "outside its" in refusal(dataset, root)
    if dataset == "vindr_cxr":
        sizes = "image_id,dim0,dim1\n" + "".join(f"{name},64,64\n" for name in before["study_id"])
        (root / "train_meta.csv").write_text(sizes)
        after = prepared(dataset, root)[0]
        old, new = (boxes_of(f[f["boxes"] != ""].iloc[0])[0]["xywh"] for f in (before, after))
        assert [value / 2 for value in old] == new


@pytest.mark.parametrize("dataset", ["nih", "rsna_pneumonia", "rsna_sample", "ms_cxr"])
def test_a_box_outside_its_image_is_named(copied, dataset):
    root = copied(dataset)
    pattern = {"nih": "BBox*", "ms_cxr": "MS_CXR*"}.get(dataset, "stage_2_train_labels.csv")
    path = next(root.glob(pattern))
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    column = next(name for name in table if name in ("Bbox [x", "x"))
    row = int((table[column] != "").idxmax())
    table.loc[row, column] = "1020"
    table.to_csv(path, index=False)
    text = refusal(dataset, root)
    assert path.name in text and f"row {row + 2}: [1020.0" in text and "outside its image" in text


def test_masks_from_runs_have_the_size_of_their_image(copied):
    root = copied("siim_pneumothorax")
    table = pd.read_csv(root / "train-rle.csv")
    table.columns = ["ImageId", "EncodedPixels"]
    table.to_csv(root / "stage_2_train.csv", index=False)
    (root / "train-rle.csv").unlink()
    frame = prepared("siim_pneumothorax", root)[0]
    areas = {}
    for row in frame[frame["masks"] != ""].to_dict("records"):
        with Image.open(root / masks_of(row)[0]["path"]) as mask:
            assert mask.size == (1024, 1024)
            areas[row["study_id"]] = mask.histogram()[-1]
    (root / "stage_2_images").mkdir()
    for row in frame.to_dict("records"):
        Image.fromarray(read_gray(root / row["images"])[::4, ::4]).save(root / f"stage_2_images/{row['study_id']}.png")
    shutil.rmtree(root / "dicom-images-train")
    frame = prepared("siim_pneumothorax", root)[0]
    for row in frame[frame["masks"] != ""].to_dict("records"):
        with Image.open(root / masks_of(row)[0]["path"]) as mask:
            assert mask.size == (256, 256)
            assert mask.histogram()[-1] * 16 == pytest.approx(areas[row["study_id"]], rel=0.2)
