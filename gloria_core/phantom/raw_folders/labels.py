"""Raw folders of datasets with labels and no reports: CheXpert, its 5x200, ChestX-ray14, COVIDx, Kermany, own CSV."""

from collections.abc import Sequence
from pathlib import Path

from gloria_core.phantom.disease import COMPETITION, LABELS
from gloria_core.phantom.raw_folders import files
from gloria_core.phantom.study import PhantomStudy


def chexpert(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """The small release: train.csv, valid.csv and JPEG. Oddity: paths begin with the folder's own name."""
    yield from _chexpert(root, files.simulate(n_studies, size=size, seed=seed, lateral=True))


def chexpert_5x200(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """The same folder, of studies that have one finding alone: those that the 5x200 set is drawn from."""
    findings = [name for name in LABELS if name != "No Finding"]
    alone = []
    for one in files.simulate(4 * n_studies, size=size, seed=seed):
        named = [name for name in findings if one.labels[name] in (1, -1)]
        if len(named) == 1 and named[0] in COMPETITION and one.labels[named[0]] == 1:
            alone.append(one)
    yield from _chexpert(root, alone[:n_studies])


def _chexpert(root: Path, studies: Sequence[PhantomStudy]) -> files.Rows:
    for one in studies:
        for split, key, view, pixels in files.chexpert_images(one):
            files.write_picture(root / f"{key}.jpg", pixels)
            yield f"{split}.csv", {
                "Path": f"CheXpert-v1.0-small/{key}.jpg", "Sex": {"M": "Male", "F": "Female"}[one.patient.sex],
                "Age": one.patient.age, "Frontal/Lateral": view.title(),
                "AP/PA": one.projection if view == "frontal" else "", **files.label_cells(one),
            }  # fmt: skip


def nih(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """Tables and lists of the 2017 release, PNG in images_001/images/. Oddity: "Infiltrate" in the table of boxes."""
    names = files.NAMES["nih"]
    yield "BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    for one in files.simulate(n_studies, size=size, seed=seed):
        patient = one.patient.patient + 1
        name = f"{patient:08d}_{one.number - 1:03d}.png"
        files.write_picture(root / f"images_001/images/{name}", one.images["frontal"])
        labels = [theirs for ours, theirs in names.items() if one.labels[ours] == 1] or ["No Finding"]
        yield "Data_Entry_2017.csv", {
            "Image Index": name, "Finding Labels": "|".join(labels),
            "Follow-up #": one.number - 1, "Patient ID": patient,
            "Patient Age": one.patient.age, "Patient Gender": one.patient.sex, "View Position": one.projection,
            "OriginalImage[Width": 2500, "Height]": 2048, "OriginalImagePixelSpacing[x": 0.168, "y]": 0.168,
        }  # fmt: skip
        yield files.split_of(one, {"train_val_list.txt": 8, "test_list.txt": 2}), name
        for region in files.regions_of(one, names) if patient % 5 == 0 else ():
            if names[region.label] in labels:
                label = names[region.label].replace("Infiltration", "Infiltrate")
                yield "BBox_List_2017.csv", ",".join(map(str, [name, label, *files.original_box(region), "", "", ""]))


def covidx(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """Version 9A: lists with blanks between patient, file, class and source. Oddity: files of several formats."""
    for i, one in enumerate(files.simulate(n_studies, size=size, seed=seed)):
        split = files.split_of(one, {"train": 8, "test": 2})
        name, person = f"img{i:04d}.{('png', 'jpg')[i % 2]}", one.patient.patient
        files.write_picture(root / split / name, one.images["frontal"])
        kind = "normal" if one.labels["No Finding"] == 1 else ("pneumonia", "COVID-19")[person % 2]
        yield f"{split}_COVIDx9A.txt", f"{person} {name} {kind} {('rsna', 'cohen')[person % 2]}"


def kermany(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """train/, test/ and val/ with a folder a class; patients are in the names of the files. There are no tables."""
    yield from ()
    opacities = ("Lung Opacity", "Consolidation")
    for i, one in enumerate(files.simulate(n_studies, size=size, seed=seed, half_with=opacities)):
        sick = any(one.labels[name] == 1 for name in opacities)
        kind, person = "PNEUMONIA" if sick else "NORMAL", one.patient.patient
        name = f"person{person}_{('bacteria', 'virus')[i % 2]}_{i}" if sick else f"IM-{person:04d}-{i:04d}"
        split = files.split_of(one, {"train": 7, "val": 1, "test": 2})
        files.write_picture(root / split / kind / f"{name}.jpeg", one.images["frontal"])


def own_csv(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """A table of one's own: image, patient, report and one label in words."""
    for i, one in enumerate(files.simulate(n_studies, size=size, seed=seed, half_with=("Pleural Effusion",))):
        files.write_picture(root / f"scans/{i:04d}.png", one.images["frontal"])
        effusion = {1.0: "yes", 0.0: "no", -1.0: "uncertain"}.get(one.labels["Pleural Effusion"], "")
        yield "studies.csv", {"image": f"scans/{i:04d}.png", "patient": f"P{one.patient.patient}",
                              "view": one.projection, "impression": one.impression, "Effusion": effusion}  # fmt: skip
