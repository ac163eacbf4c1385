"""Raw folders of datasets with boxes: RSNA pneumonia, its sample under NIH's names, VinDr-CXR, Object-CXR, MS-CXR."""

import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from gloria_core.phantom.raw_folders import files
from gloria_core.phantom.raw_folders.labels import nih
from gloria_core.phantom.raw_folders.reports import mimic_cxr, mimic_image
from gloria_core.phantom.study import PhantomStudy

OPACITIES = ("Pneumonia", "Lung Opacity", "Consolidation")


def _rsna_images(studies: Sequence[PhantomStudy], seed: int) -> Iterator[tuple[PhantomStudy, str, str, list[dict]]]:
    """Each study with the id and the class of its image, and the rows of its boxes, which count original pixels."""
    for i, one in enumerate(studies):
        name = str(uuid.UUID(int=(seed << 96) + (i + 1) * 0x9E3779B97F4A7C15))
        opacities = [files.original_box(region) for region in files.regions_of(one, OPACITIES)]
        healthy = "Normal" if one.labels["No Finding"] == 1 else "No Lung Opacity / Not Normal"
        places = [dict(zip(("x", "y", "width", "height"), box, strict=True)) for box in opacities or [[""] * 4]]
        rows = [{"patientId": name, **place, "Target": int(bool(opacities))} for place in places]
        yield one, name, "Lung Opacity" if opacities else healthy, rows


def rsna_pneumonia(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """Kaggle's stage 2: JPEG in DICOM, a row a box. Boxes count pixels of the 1024-pixel originals."""
    studies = files.simulate(n_studies, size=size, seed=seed, half_with=OPACITIES)
    for one, name, kind, boxes in _rsna_images(studies, seed):
        about = {"ViewPosition": one.projection, "PatientSex": one.patient.sex, "PatientAge": f"{one.patient.age:03d}Y"}
        files.write_dicom(root / f"stage_2_train_images/{name}.dcm", files.enlarge(one.images["frontal"]), **about)
        for box in boxes:
            yield "stage_2_train_labels.csv", box
            yield "stage_2_detailed_class_info.csv", {"patientId": name, "class": kind}


def rsna_sample(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """RSNA's boxes beside NIH's own images and table of entries."""
    yield from nih(root, n_studies=n_studies, size=size, seed=seed)
    (root / "images_001/images").rename(root / "images")
    (root / "images_001").rmdir()
    studies = files.simulate(n_studies, size=size, seed=seed)
    for i, (one, name, kind, boxes) in enumerate(_rsna_images(studies, seed)):
        yield from (("stage_2_train_labels.csv", box) for box in boxes)
        image = f"{one.patient.patient + 1:08d}_{one.number - 1:03d}.png"
        match = {"patientId": name, "image_index": image, "rsna_class": kind, "rsna_match_mse": 0.5}
        yield "rsna_to_nih.csv", match
        yield "image_source.csv", {"image_index": image, "source": "AB"[i % 2]}


def vindr_cxr(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """PhysioNet's layout: 12-bit DICOM, three readers of each training image, a consensus of each test image.

    Oddities: some images are stored with white as zero; one reader in three sees one box less.
    """
    names = files.NAMES["vindr_cxr"]
    for i, one in enumerate(files.simulate(n_studies, size=size, seed=seed, half_with=names)):
        split, name = files.split_of(one, {"train": 7, "test": 3}), f"{i:032x}"
        files.write_dicom(root / f"{split}/{name}.dicom", one.images["frontal"], bits=12, white_is_zero=i % 4 == 0)
        regions = files.regions_of(one, names)
        for reader in ["R8", "R9", "R10"] if split == "train" else [""]:
            seen = regions[: len(regions) - (reader == "R10" and i % 3 == 0)]
            about = {"image_id": name} | ({"rad_id": reader} if reader else {})
            present = {names[region.label] for region in seen}
            values = {theirs: int(theirs in present) for theirs in names.values()}
            yield f"annotations/image_labels_{split}.csv", {**about, **values, "No finding": int(not present)}
            boxes = [{"class_name": "No finding"}] if not seen else []
            for region in seen:
                x, y, w, h = region.box
                box = {"class_name": names[region.label], "x_min": x, "y_min": y, "x_max": x + w, "y_max": y + h}
                boxes.append(box)
            yield from ((f"annotations/annotations_{split}.csv", about | box) for box in boxes)


def object_cxr(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """train.csv and dev.csv with rectangles, ellipses and polygons; paths begin with the owner's /path/."""
    for i, one in enumerate(files.simulate(n_studies, size=size, seed=seed, half_with=("Support Devices",))):
        split, shapes = files.split_of(one, {"train": 8, "dev": 2}), []
        files.write_picture(root / f"{split}/{i:05d}.jpg", one.images["frontal"])
        for k, region in enumerate(files.regions_of(one, ("Support Devices",))):
            x, y, w, h = region.box
            corners = [x, y, x + max(w, 2), y + max(h, 2)]
            points = [x, y, x + max(w, 2), y, x + max(w, 2), y + max(h, 2)]
            shapes.append(" ".join(map(str, [k % 3, *(points if k % 3 == 2 else corners)])))
        yield f"{split}.csv", {"image_path": f"/path/{split}/{i:05d}.jpg", "annotation": ";".join(shapes)}


def ms_cxr(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """A simulated MIMIC-CXR-JPG with phrases and boxes on its images, version 1.1.0 (with splits)."""
    yield from mimic_cxr(root, n_studies=n_studies, size=size, seed=seed)
    rows = {}
    for i, one in enumerate(files.simulate(n_studies, size=size, seed=seed, lateral=True)):
        path, ids = mimic_image(seed, i, one, "frontal")
        for region in files.regions_of(one, files.NAMES["ms_cxr"]):
            section, start, end = region.spans[0] if region.spans else ("impression", 0, len(one.impression))
            x, y, w, h = region.box
            row = {"category_name": region.label, "label_text": one.text((section, start, end)), "path": path,
                   "x": x, "y": y, "w": w, "h": h, "image_width": size, "image_height": size,
                   "dicom_id": ids["dicom_id"],
                   "split": files.split_of(one, {"train": 6, "val": 2, "test": 2})}  # fmt: skip
            rows[tuple(row.values())] = row  # the owner lists no box twice
    yield from (("MS_CXR_Local_Alignment_v1.1.0.csv", row) for row in rows.values())
