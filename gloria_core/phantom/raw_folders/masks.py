"""Raw folders of datasets with masks: SIIM-ACR pneumothorax, Montgomery and Shenzhen, Oxford-IIIT Pet."""

from pathlib import Path

import numpy as np

from gloria_core.phantom.raw_folders import files


def _relative_runs(mask: np.ndarray) -> str:
    """SIIM's run lengths: down the columns, each start counted from the end of the run before."""
    edges = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=False))
    return " ".join(map(str, np.diff(edges, prepend=0)))


def siim_pneumothorax(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """Stage 1: DICOM in folders of study and series, runs in train-rle.csv. Oddities: a blank before the name
    EncodedPixels and before every -1; several rows of an image."""
    for i, one in enumerate(files.simulate(n_studies, size=size, seed=seed, half_with=("Pneumothorax",))):
        name = f"1.2.276.0.7230010.3.1.4.8323329.{1000 + i}.1517875{i:06d}.{100 + seed}"
        folder = f"dicom-images-train/1.2.276.0.7230010.3.1.2.{i}/1.2.276.0.7230010.3.1.3.{i}"
        pixels, about = files.enlarge(one.images["frontal"]), {"PatientSex": one.patient.sex}
        files.write_dicom(root / folder / f"{name}.dcm", pixels, ViewPosition=one.projection, **about)
        runs = [_relative_runs(files.enlarge(region.mask)) for region in files.regions_of(one, ("Pneumothorax",))]
        for text in runs or ["-1"]:
            yield "train-rle.csv", {"ImageId": name, " EncodedPixels": f" {text}"}


def montgomery_shenzhen(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """Both sets with readings; a mask a side in Montgomery, one of both in Shenzhen. Oddity: images without a mask."""
    for i, one in enumerate(files.simulate(n_studies, size=size, seed=seed)):
        sick = int(one.labels["No Finding"] != 1)
        folder, stem = (("MontgomerySet", "MCUCXR"), ("ChinaSet_AllFiles", "CHNCXR"))[i % 2]
        name, left = f"{stem}_{i + 1:04d}_{sick}", files.rough_lungs(size)
        files.write_picture(root / f"{folder}/CXR_png/{name}.png", one.images["frontal"])
        age, sex = one.patient.age, one.patient.sex
        if i % 2 == 0:
            for side, mask in (("left", left[:, ::-1]), ("right", left)):
                files.write_picture(root / f"MontgomerySet/ManualMask/{side}Mask/{name}.png", mask)
            text = f"Patient's Sex: {sex}\nPatient's Age: {age:03d}Y"
        else:
            if i % 8 != 1:
                files.write_picture(root / f"mask/{name}_mask.png", left | left[:, ::-1])
            text = f"{ {'M': 'male', 'F': 'female'}[sex] } {age}yrs"
        yield f"{folder}/ClinicalReadings/{name}.txt", f"{text}\n{one.impression}"


def oxford_pet(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """Photographs with trimaps (1 pet, 2 background, 3 border); a bright disc or square is the pet here."""
    rng = np.random.default_rng(seed)
    across, down = np.meshgrid(np.arange(size), np.arange(size))
    for i in range(n_studies):
        cat, radius = i % 2 == 0, size * rng.uniform(0.15, 0.3)
        x, y = rng.uniform(radius, size - radius, 2)
        distance = np.hypot(across - x, down - y) if cat else np.maximum(abs(across - x), abs(down - y))
        pixels = np.where(distance < radius, 200, 60) + rng.integers(-20, 20, (size, size))
        name = f"{'Abyssinian' if cat else 'beagle'}_{i + 1}"
        files.write_picture(root / f"images/{name}.jpg", np.stack([pixels.astype(np.uint8)] * 3, axis=-1))
        trimap = np.where(distance < radius - 2, 1, np.where(distance < radius + 2, 3, 2)).astype(np.uint8)
        files.write_picture(root / f"annotations/trimaps/{name}.png", trimap)
        yield f"annotations/{'trainval' if i % 4 else 'test'}.txt", f"{name} {1 if cat else 5} {1 if cat else 2} 1"
