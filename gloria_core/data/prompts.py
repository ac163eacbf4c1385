"""Sentences for labels: reports made from labels (for datasets without reports) and zero-shot prompts.

Reports follow CXR-CLIP (You et al. 2023, https://arxiv.org/abs/2310.13292, prompt generation of its released code):
one sentence a label, drawn from that label's positive, negative or uncertain sentences, in random order.
Zero-shot prompts of GLoRIA are its released dictionary (Huang et al. 2021, gloria/constants.py, Apache-2.0).

A prompt set is a JSON file: {"name", "attribution", "classes": {label: {"pos": [...], "neg": [...], "unc": [...]}},
"combinations": {label: {part: [...]}}}. `combinations` is optional and only GLoRIA's has it: a label without "pos"
sentences gets all combinations of its parts, without the spaces that empty parts leave.
"""

import itertools
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gloria_core.data.files import did_you_mean

Kind = Literal["pos", "neg", "unc"]
KINDS = Kind.__args__
NO_FINDING = "No Finding"
FROM_LABELS = "labels"  # name of the prompt set that `prompts_for` makes from the names of labels
_FOLDER = resources.files("gloria_core.data") / "prompt_sets"


class PromptError(ValueError):
    """A prompt set is malformed, or lacks a label or a kind of sentence that is needed."""


Sentences = list[Annotated[str, Field(pattern=r"\S")]]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class PromptSet:
    """Sentences by label: `classes[label]["pos" | "neg" | "unc"]` is a list of strings, perhaps empty."""

    name: str = ""
    classes: dict[str, dict[Kind, Sentences]] = Field(default={}, min_length=1, validate_default=True)
    attribution: str = ""
    combinations: dict[str, dict[str, list[str]]] = Field(default={})

    def __post_init__(self) -> None:
        for label in (*self.classes, *self.combinations):
            kinds = self.classes.get(label, {})
            self.classes[label] = {kind: kinds.get(kind, []) for kind in KINDS}
        for label in self.combinations:
            if not self.classes[label]["pos"]:
                plain = (" ".join(sentence.split()) for sentence in class_combinations(self, label))
                self.classes[label]["pos"] = list(dict.fromkeys(plain))


def available_prompts() -> list[str]:
    """Names of the prompt sets that come with the package."""
    return sorted(item.name.removesuffix(".json") for item in _FOLDER.iterdir() if item.name.endswith(".json"))


def load_prompts(name_or_path: str | Path) -> PromptSet:
    """A prompt set of the package by name ("nih"), or any JSON file of this form by its path.

    Raises PromptError for an unknown name, and for a malformed file, naming file, label and kind.
    """
    name, known = str(name_or_path), available_prompts()
    path = _FOLDER / f"{name}.json" if name in known else Path(name_or_path)
    if not path.is_file():
        near = did_you_mean(name, known)
        raise PromptError(f"no prompt set {name!r}: neither a file nor one of {', '.join(known)}.{near}")
    try:
        prompts = TypeAdapter(PromptSet).validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        fault = error.errors()[0]
        raise PromptError(f"{path}: {' > '.join(map(str, fault['loc']))}: {fault['msg']}") from None
    return prompts if prompts.name else replace(prompts, name=path.stem)


def prompts_for(dataset: str, labels: Iterable[str], prompt_set: str | Path = "") -> PromptSet:
    """The prompt set to use for `dataset`, whose findings are `labels`; its `name` says what was chosen.

    prompt_set: a name or file for `load_prompts`, or "labels" for sentences made from the names of the labels. Empty:
    the set of the package that carries the dataset's name, with sentences from their names for labels that it lacks
    (its name is then "<dataset>, labels"); "labels" where there is no such set. Raises PromptError as `load_prompts`.
    """
    if prompt_set and str(prompt_set) != FROM_LABELS:
        return load_prompts(prompt_set)
    made = {label: _sentences(label) for label in (*labels, NO_FINDING)}
    if prompt_set or dataset not in available_prompts():
        return PromptSet(FROM_LABELS, made)
    own = load_prompts(dataset)
    lacking = {label: kinds for label, kinds in made.items() if label not in own.classes}
    return replace(own, name=f"{dataset}, {FROM_LABELS}", classes=own.classes | lacking) if lacking else own


def _sentences(label: str) -> dict[Kind, list[str]]:
    """Positive, negative and uncertain sentences made from the name of a label, e.g. "Pleural_Thickening"."""
    name = label.replace("_", " ")
    if name.lower() in ("no finding", "normal"):
        negative = ["Not normal.", "There is a finding."]
        return {"pos": ["Normal.", "No finding."], "neg": negative, "unc": ["Probably normal."]}
    # abbreviations keep their capitals: COVID-19, NG tube
    name = " ".join(word if sum(map(str.isupper, word)) > 1 else word.lower() for word in name.split())
    first = name[:1].upper() + name[1:]
    return {
        "pos": [f"{first}.", f"There is {name}.", f"{first} is present."],
        "neg": [f"No {name}.", f"There is no {name}.", f"No evidence of {name}."],
        "unc": [f"Possible {name}.", f"{first} cannot be excluded."],
    }


def report_from_labels(
    labels: Mapping[str, float], prompts: PromptSet, *, rng: np.random.Generator | None = None, n_negative: int = 0
) -> str:
    """A report that says what the labels say: a sentence for each finding that is 1, one for each that is -1, and
    for `n_negative` of those that are 0.

    Random (training): sentences and their order are drawn from `rng`. Without `rng` (evaluation): the first sentence
    of each finding that is present, in the order of `labels`; no negatives, nothing uncertain. If nothing is to be
    said, the sentence of "No Finding". Columns that begin with `is_`, and "No Finding" itself, are not spoken of.
    Raises PromptError for a label that the set does not know or that lacks the kind of sentence.

    Two choices differ from the released code: a training report is never empty (there it is, for a study without
    labels), and negatives are drawn from findings known to be absent (there, also from unknown ones).
    """
    spoken = [name for name in labels if not name.startswith("is_") and name != NO_FINDING]
    present, absent, uncertain = ([name for name in spoken if labels[name] == value] for value in (1, 0, -1))
    if rng is None:
        return " ".join(zero_shot_prompts(prompts, name)[0] for name in present or [NO_FINDING])
    # without negatives nothing is drawn for them
    count = min(n_negative, len(absent))
    absent = [absent[i] for i in sorted(rng.choice(len(absent), size=count, replace=False))] if count else []
    said = {"pos": present if present or uncertain else [NO_FINDING], "neg": absent, "unc": uncertain}
    choices = [zero_shot_prompts(prompts, name, kind=kind) for kind, names in said.items() for name in names]
    sentences = [choice[int(rng.integers(len(choice)))] for choice in choices]
    return " ".join(sentences[i] for i in rng.permutation(len(sentences)))


def zero_shot_prompts(prompts: PromptSet, label: str, *, kind: str = "pos") -> list[str]:
    """The sentences of one label to compare images with; PromptError where there are none."""
    if label not in prompts.classes:
        raise PromptError(f"prompt set {prompts.name!r} does not know {label!r}; it has: {', '.join(prompts.classes)}")
    if not prompts.classes[label].get(kind):
        raise PromptError(f"prompt set {prompts.name!r} has no {kind!r} sentence for {label!r}; add one to its file")
    return list(prompts.classes[label][kind])


def class_combinations(prompts: PromptSet, label: str) -> list[str]:
    """All combinations of a label's parts, in the order of the file, joined with single spaces.

    Empty parts leave their space, as in the released code of GLoRIA; strip them where that matters.
    """
    if label not in prompts.combinations:
        known = ", ".join(prompts.combinations) or "none"
        raise PromptError(f"prompt set {prompts.name!r} has no combinations for {label!r}; it has: {known}")
    return [" ".join(parts) for parts in itertools.product(*prompts.combinations[label].values())]


def gloria_class_prompts(n: int = 5, seed: int | None = 6) -> dict[str, list[str]]:
    """n prompts for each of the five competition findings, as GLoRIA's `generate_chexpert_class_prompts(n)` gives
    them on its first call, when the global generator is seeded with 6 by the import.

    `seed=None` draws from Python's global generator, as the original does.
    Raises PromptError where a class has fewer than n combinations (Cardiomegaly has 15).
    """
    prompts, generator = load_prompts("chexpert_gloria"), random if seed is None else random.Random(seed)
    result = {}
    for label in prompts.combinations:
        candidates = class_combinations(prompts, label)
        if not 0 < n <= len(candidates):
            raise PromptError(f"{label} has {len(candidates)} prompts, {n} are needed")
        result[label] = generator.sample(candidates, n)
    return result
