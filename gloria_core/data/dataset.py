"""Prepared datasets, their studies as items, and items as batches.

Notebook 01 writes `manifest.csv` and, next to it, `dataset.json` (name, root, image size, cache folder). Every later
notebook is given the path of the manifest alone and gets all of it back with `open_dataset`.

An item depends on the seed, the epoch and its number, and the order of the batches on the seed and the epoch: never on
workers, processes or what was read before. So a training run can be resumed in the middle of an epoch.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import PositiveInt, SkipValidation, validate_call
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from gloria_core.data.cache import ImageCache, require_shards
from gloria_core.data.files import atomic_write, did_you_mean
from gloria_core.data.images import Norm, to_tensor
from gloria_core.data.manifest import (
    COMPETITION_LABELS,
    ExcludedRows,
    Failure,
    ManifestError,
    boxes_of,
    failures_at,
    label_columns,
    raise_failures,
    read_manifest,
    validate,
    write_manifest,
)
from gloria_core.data.prompts import PromptSet
from gloria_core.data.reports import Span, StudyTexts
from gloria_core.data.splits import WITHOUT
from gloria_core.data.tokenizer import tokenize
from gloria_core.types import Batch

# With augment=True: largest relative change of contrast, and of brightness as a share of the gray range.
JITTER = 0.1
ROUNDING = 1.0  # pixels that a box may reach beyond the edge of its image


@dataclass(frozen=True)
class PreparedDataset:
    """A checked manifest `frame`, the `cache` of its images at `size` pixels, and the `root` of its image paths."""

    name: str
    root: Path
    size: int
    frame: pd.DataFrame
    cache: ImageCache

    @property
    def competition(self) -> list[str]:
        """Label columns that are one of the five findings of the CheXpert competition: what `macro` is the mean of."""
        named = {*COMPETITION_LABELS, "Effusion"}  # the NIH tables' name of Pleural Effusion
        return [name for name in label_columns(self.frame) if name in named]

    def exclude(self, rule: str) -> pd.DataFrame:
        """The frame without the test studies that a rule "column=value" names; training and validation stay whole.

        For judging outside a confounder: `exclude("meta_source=A")`.
        Raises ManifestError for an unknown column, and for a rule that names no test study or all of them.
        """
        column, _, value = rule.partition("=")
        if column not in self.frame:
            known = did_you_mean(column, self.frame.columns)
            raise ManifestError(f"rule {rule!r}: the manifest has no column {column!r}.{known}")
        test = self.frame["split"] == "test"
        named = test & (self.frame[column].astype(str) == value)
        if not 0 < named.sum() < test.sum():
            values = ", ".join(sorted(set(map(str, self.frame[column][test])))[:8])
            remedy = f"it must name some and leave some; {column!r} of the test studies is one of: {values}"
            raise ManifestError(f"rule {rule!r} names {named.sum()} of {test.sum()} test studies: {remedy}")
        return self.frame[~named]

    def test_sets(self, exclude: str = "") -> dict[str, pd.DataFrame]:
        """Test rows by the name they are reported under: the dataset's, and, with a rule, "<name> not <rule>".

        The index is that of `frame`. Raises ManifestError without test studies, and as `exclude` does.
        """
        sets = {self.name: self.split("test")}
        if exclude:
            sets[f"{self.name} not {exclude}"] = self.exclude(exclude).query("split == 'test'")
        return sets

    def split(self, name: str) -> pd.DataFrame:
        """Rows of split `name` (train, valid or test); an empty split raises ManifestError."""
        rows = self.frame[self.frame["split"] == name]
        if rows.empty:
            raise ManifestError(f"dataset {self.name!r} has {WITHOUT[name]}")
        return rows


def save_dataset(
    folder: str | Path,
    frame: pd.DataFrame,
    *,
    name: str,
    root: str | Path,
    size: int,
    on_error: str = "raise",
    shards: str | Path = "",
) -> PreparedDataset:
    """Write `folder/manifest.csv` and `folder/dataset.json`, and build `folder/cache` from the images under `root`.

    `on_error="exclude"` leaves studies with unreadable images, and those with a box outside its image, out of the
    manifest; they are listed, with the reason, in `folder/excluded.csv`. A box that reaches up to `ROUNDING` beyond the
    edge is kept; what uses it cuts it there. `shards`: the folder of a cache that `python -m gloria_core.data.cache`
    has begun; it is completed and used there. Raises ManifestError or ImageError otherwise, CacheError for a folder
    without shards of these images at this size.
    """
    folder, root = Path(folder), Path(root).resolve()
    if str(shards):
        require_shards(frame, shards, size)
    validate(frame, source=f"dataset {name}")  # before hours of decoding
    folder.mkdir(parents=True, exist_ok=True)
    cache = ImageCache.build(frame, root, size=size, folder=shards or folder / "cache", on_error=on_error)
    frame = cache.usable(frame)
    excluded, failures = frame.attrs["excluded"], _boxes_outside(frame, cache)
    if on_error == "raise" or len(failures) >= len(frame):
        raise_failures(failures, source=f"boxes of {name}, images below {root}")
    excluded += ExcludedRows.of(failures)
    if excluded:
        pd.DataFrame(excluded).to_csv(folder / "excluded.csv", index=False)
    frame = frame[~frame["study_id"].isin([failure.study_id for failure in failures])].reset_index(drop=True)
    write_manifest(frame, folder / "manifest.csv")
    # paths inside the folder are kept relative to it, so that it can be moved as a whole
    known = {"name": name, "root": _relative(root, folder), "size": size, "cache": _relative(cache.index, folder)}
    atomic_write(folder / "dataset.json", json.dumps(known, indent=2) + "\n")
    return PreparedDataset(name, root, size, frame, cache)


def open_dataset(manifest: str | Path) -> PreparedDataset:
    """Open what `save_dataset` wrote, given the path of its `manifest.csv`.

    Raises ManifestError where the manifest, `dataset.json` or the image folder is missing, naming the remedy.
    """
    if not str(manifest):
        raise ManifestError("`manifest` is blank: run notebook 01 first and give the manifest.csv that it writes")
    manifest = Path(manifest)
    description = manifest.with_name("dataset.json")
    for path in (manifest, description):
        if not path.is_file():
            raise ManifestError(f"{path} is missing: run notebooks/01_data_preparation.ipynb, which writes it")
    known = json.loads(description.read_text(encoding="utf-8"))
    root = (manifest.parent / known["root"]).resolve()
    if not root.is_dir():
        raise ManifestError(f"{description} names the image folder {root}, which is not there: prepare the data again")
    frame = read_manifest(manifest)
    cache = ImageCache((manifest.parent / known["cache"]).resolve())
    return PreparedDataset(known["name"], root, known["size"], frame, cache)


def _boxes_outside(frame: pd.DataFrame, cache: ImageCache) -> list[Failure]:
    """Boxes that are not inside their images."""
    faults, remedy = [], "boxes count the pixels of the image file: scale or correct them"
    for position, row in enumerate(frame[["images", "boxes"]].to_dict("records")):
        for box in boxes_of(row):
            (x, y, width, height), path = box["xywh"], row["images"].split(";")[box["image"]]
            image = cache.geometry(path)
            if min(x, y) < -ROUNDING or x + width > image.width + ROUNDING or y + height > image.height + ROUNDING:
                where = f"{box['xywh']} of {box['label']!r} leaves {path} ({image.width} x {image.height} pixels)"
                faults.append((position, "boxes", f"{where}; {remedy}"))
    return failures_at(frame, faults)


def _relative(path: Path, folder: Path) -> str:
    path, folder = Path(path).resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


@dataclass(frozen=True)
class StudyItem:
    """One study as the workers hand it over.

    Shape: pixels (V, crop, crop) uint8; `spans[t]` the sentences of `texts[t]`; labels (K,) float32, NaN unknown.
    """

    pixels: np.ndarray
    texts: tuple[str, ...]
    spans: tuple[tuple[Span, ...], ...]
    labels: np.ndarray
    index: int
    study_id: str


class StudyDataset(Dataset[StudyItem]):
    """Images, text and labels of the studies in a manifest frame.

    text: the section that is read; "both" joins findings and impression, or whichever of them has text.
    sentence: "all" reads the section whole, "random" one sentence of it, "published" one sentence cut and cleaned by
        GLoRIA's released rule (`pretraining_dataset.py`, its word limit of 5 included).
    views: images per study. One view is a frontal where the study has one. Several are distinct views (by the
        manifest's `views`) as long as the study has them, then further images of these views, then the same images
        again, each with an augmentation of its own (CXR-CLIP, You et al. 2023). Without augmentation the first ones
        are taken, frontals first; with it, random ones.
    texts: texts per study. With text="both" and sentence="all" they are its sections in random order, each once as long
        as the study has them (CXR-CLIP); otherwise independent draws.
    augmented_texts, prompts: other wordings, and reports for studies without text; see `StudyTexts`. They are drawn
        anew for every text and epoch; without augmentation reports from labels are the fixed ones.
    augment: False centre crop; "crop" random crop, as GLoRIA (256 -> 224); True random crop and a mild jitter of
        brightness and contrast. Never a flip: reports say left and right.
    labels: label columns in this order; by default all of the manifest.

    Item i depends on (seed, epoch, i) only.
    Raises: ReportError naming studies whose chosen section is empty (with `prompts`: that have no label either),
    PromptError for a label without sentences, ValueError for unknown options or columns.
    """

    @validate_call(config={"arbitrary_types_allowed": True})
    def __init__(
        self,
        frame: pd.DataFrame,
        cache: SkipValidation[ImageCache],
        *,
        crop: PositiveInt,
        text: Literal["impression", "findings", "both"] = "impression",
        sentence: Literal["all", "random", "published"] = "all",
        views: PositiveInt = 1,
        texts: PositiveInt = 1,
        augment: bool | Literal["crop"] = False,
        seed: int = 0,
        labels: Sequence[str] | None = None,
        augmented_texts: bool = False,
        prompts: PromptSet | None = None,
    ) -> None:
        self.frame = frame.reset_index(drop=True)
        self.cache, self.crop, self.seed, self.epoch = cache, crop, seed, 0
        self.sentence, self.augment, self.views, self.texts = sentence, augment, views, texts
        self.label_names = list(label_columns(frame) if labels is None else labels)
        unknown = [name for name in self.label_names if name not in frame.columns]
        if unknown:
            raise ValueError(f"no label column {unknown}; the manifest has {label_columns(frame)}")
        self._labels = self.frame[self.label_names].to_numpy(dtype=np.float32, na_value=np.nan)
        self._study_ids = self.frame["study_id"].tolist()
        self._images = self.frame["images"].str.split(";").tolist()
        self._views = self.frame["views"].str.split(";").tolist()
        self._texts = StudyTexts(
            self.frame, text=text, sentence=sentence, augmented=augmented_texts, prompts=prompts, fixed=augment is False
        )

    def __len__(self) -> int:
        return len(self._study_ids)

    def set_epoch(self, epoch: int) -> None:
        """Draws sentences, crops and views anew; call it before the epoch's loader is made."""
        self.epoch = int(epoch)

    def __getitem__(self, index: int) -> StudyItem:
        index = range(len(self))[index]
        # separate streams: changing how texts are drawn leaves the crops alone
        text_rng, image_rng = (np.random.default_rng([self.seed, self.epoch, index, part]) for part in range(2))
        texts, spans = zip(*self._texts.draw(index, self.texts, text_rng), strict=True)
        numbers = self._choose(index, image_rng)
        pixels = np.stack([self._image(self._images[index][number], image_rng) for number in numbers])
        return StudyItem(pixels, texts, spans, self._labels[index], index, self._study_ids[index])

    def _choose(self, index: int, rng: np.random.Generator) -> list[int]:
        """Numbers of the images to show."""
        views = self._views[index]
        frontals = [i for i, view in enumerate(views) if view != "LATERAL"]
        numbers = repeats = frontals or list(range(len(views)))
        if self.views > 1:
            numbers = frontals + [i for i in range(len(views)) if i not in frontals]
        if self.augment:
            numbers = [numbers[i] for i in rng.permutation(len(numbers))]
        if self.views > 1:
            kinds = list(dict.fromkeys(views[i] for i in numbers))
            if self.augment:  # every view equally often first, however many images it has
                kinds = [kinds[k] for k in rng.permutation(len(kinds))]
            turn = {i: sum(views[j] == views[i] for j in numbers[:place]) for place, i in enumerate(numbers)}
            numbers = sorted(numbers, key=lambda i: (turn[i], kinds.index(views[i])))
        missing = max(0, self.views - len(numbers))
        return (numbers + repeats * missing)[: self.views]

    def _image(self, path: str, rng: np.random.Generator) -> np.ndarray:
        image = np.asarray(self.cache[path])
        margin = image.shape[0] - self.crop
        if margin < 0:
            raise ValueError(f"crop={self.crop} is larger than the cached images ({image.shape[0]} px)")
        top, left = rng.integers(0, margin + 1, size=2) if self.augment else (margin // 2, margin // 2)
        image = image[top : top + self.crop, left : left + self.crop]
        if self.augment is not True:
            return np.ascontiguousarray(image)
        contrast, brightness = rng.uniform(-JITTER, JITTER, size=2)
        gray = np.arange(256)
        table = (gray - 127.5) * (1 + contrast) + 127.5 + 255 * brightness
        return np.clip(np.rint(table), 0, 255).astype(np.uint8)[image]


@dataclass(frozen=True)
class Collate:
    """Items -> Batch: pads and tokenises the texts, normalises the pixels as `images.to_tensor` does."""

    tokenizer: PreTrainedTokenizerFast
    _: KW_ONLY
    channels: int = 3
    norm: Norm = "half"
    max_tokens: int = 97

    def __call__(self, items: Sequence[StudyItem]) -> Batch:
        """Shape: pixels (B, V, C, crop, crop) float32; N = B * T texts, study-major."""
        pixels = torch.from_numpy(np.stack([item.pixels for item in items]))
        return Batch(
            pixels=to_tensor(pixels, channels=self.channels, norm=self.norm),
            text=tokenize(
                self.tokenizer,
                [text for item in items for text in item.texts],
                max_tokens=self.max_tokens,
                sentence_spans=[spans for item in items for spans in item.spans],
                names=[f"study {item.study_id}" for item in items for _ in item.texts],
            ),
            labels=torch.from_numpy(np.stack([item.labels for item in items])),
            index=torch.tensor([item.index for item in items]),
        )


def make_loader(
    dataset: StudyDataset,
    collate: Collate,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    epoch: int | None = None,
    drop_last: bool = False,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    skip_batches: int = 0,
) -> DataLoader[Batch]:
    """Loader of one epoch; make a new one for the next.

    `batch_size` counts the studies of one process, as torch does. Batch k of the `world_size` processes, joined in the
    order of the ranks, is batch k of a single process with `world_size` times the batch size. `epoch` (default: the
    dataset's) sets the order together with `seed`, and the draws of the items; the dataset itself is left as it is.
    `skip_batches` leaves out the first ones without reading them.

    Raises: ValueError when the last batch has fewer studies than processes, or there is no whole batch with drop_last.
    """
    if not 0 <= rank < world_size or batch_size < 1:
        raise ValueError(f"rank={rank}, world_size={world_size}, batch_size={batch_size}: rank from 0, sizes from 1")
    current = copy.copy(dataset)
    if epoch is not None:
        current.set_epoch(epoch)
    n = len(current)
    order = np.random.default_rng([seed, current.epoch]).permutation(n) if shuffle else np.arange(n)
    together = batch_size * world_size
    stop = n - n % together if drop_last else n
    if stop == 0:
        raise ValueError(f"{n} studies make no batch of {batch_size} x {world_size}; use a smaller batch_size")
    whole = [order[start : min(start + together, stop)] for start in range(0, stop, together)]
    if len(whole[-1]) < world_size:
        raise ValueError(f"the last batch has {len(whole[-1])} studies for {world_size} processes; use drop_last=True")
    parts = [np.array_split(batch, world_size)[rank].tolist() for batch in whole[skip_batches:]]
    return DataLoader(current, batch_sampler=parts, collate_fn=collate, num_workers=workers)
