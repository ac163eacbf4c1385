"""Sentences for labels: reports made from labels (for datasets without reports) and zero-shot prompts.

Reports follow CXR-CLIP (You et al. 2023, https://arxiv.org/abs/2310.13292, prompt generation of its released code):
one sentence a label, drawn from that label's positive, negative or uncertain sentences, in random order.
Zero-shot prompts of GLoRIA are its released dictionary (Huang et al. 2021, gloria/constants.py, Apache-2.0).

A prompt set is a JSON file: {"name", "attribution", "classes": {label: {"pos": [...], "neg": [...], "unc": [...]}},
"combinations": {label: {part: [...]}}}. `combinations` is optional and only GLoRIA's has it: a label without "pos"
sentences gets all combinations of its parts, without the spaces that empty parts leave.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

KINDS = ("pos", "neg", "unc")
NO_FINDING = "No Finding"


class PromptError(ValueError):
    """A prompt set is malformed, or lacks what is asked of it."""


@dataclass(frozen=True)
class PromptSet:
    """Sentences by label: `classes[label]["pos" | "neg" | "unc"]` is a list of strings, perhaps empty."""

    name: str
    classes: dict[str, dict[str, list[str]]]
    attribution: str = ""
    combinations: dict[str, dict[str, list[str]]] = field(default_factory=dict)


def _folder() -> resources.abc.Traversable:
    return resources.files("gloria_core.data") / "prompt_sets"


def available_prompts() -> list[str]:
    """Names of the prompt sets that come with the package."""
    return sorted(item.name.removesuffix(".json") for item in _folder().iterdir() if item.name.endswith(".json"))


def load_prompts(name_or_path: str | Path) -> PromptSet:
    """A prompt set of the package by name ("nih"), or any JSON file of this form by its path.

    Raises PromptError for an unknown name, and for a malformed file, naming file, label and kind.
    """
    text = str(name_or_path)
    if text in available_prompts():
        return _parse((_folder() / f"{text}.json").read_text(encoding="utf-8"), source=f"{text}.json")
    path = Path(name_or_path)
    if not path.is_file():
        raise PromptError(f"no prompt set {text!r}: neither a file nor one of {', '.join(available_prompts())}")
    return _parse(path.read_text(encoding="utf-8"), source=text)


def report_from_labels(
    labels: Mapping[str, float],
    prompts: PromptSet,
    *,
    rng: np.random.Generator | None = None,
    n_negative: int = 0,
    deterministic: bool = False,
) -> str:
    """A report that says what the labels say: a sentence for each finding that is 1, one for each that is -1, and
    for `n_negative` of those that are 0.

    Random (training): sentences and their order are drawn from `rng`. Deterministic (evaluation): the first sentence
    of each finding that is present, in the order of `labels`; no negatives, nothing uncertain. If nothing is to be
    said, the sentence of "No Finding". Columns that begin with `is_`, and "No Finding" itself, are not spoken of.
    Raises PromptError for a label that the set does not know or that lacks the kind of sentence.

    Two choices differ from the released code: a training report is never empty (there it is, for a study without
    labels), and negatives are drawn from findings known to be absent (there, also from unknown ones).
    """
    if not deterministic and rng is None:
        raise ValueError("give a random generator `rng`, or deterministic=True")
    spoken = [name for name in labels if not name.startswith("is_") and name != NO_FINDING]
    present = [name for name in spoken if labels[name] == 1]
    uncertain = [] if deterministic else [name for name in spoken if labels[name] == -1]
    absent = [] if deterministic else [name for name in spoken if labels[name] == 0]
    if n_negative and absent:
        chosen = sorted(rng.choice(len(absent), size=min(n_negative, len(absent)), replace=False))
        absent = [absent[i] for i in chosen]
    else:
        absent = []
    if not present and not uncertain:
        present = [NO_FINDING]
    wanted = [(name, kind) for kind, names in zip(KINDS, (present, absent, uncertain), strict=True) for name in names]
    choices = [_sentences(prompts, name, kind) for name, kind in wanted]
    if deterministic:
        return " ".join(choice[0] for choice in choices)
    drawn = [choice[int(rng.integers(len(choice)))] for choice in choices]
    return " ".join(drawn[i] for i in rng.permutation(len(drawn)))


def zero_shot_prompts(prompts: PromptSet, label: str, *, kind: str = "pos") -> list[str]:
    """The sentences of one label to compare images with; PromptError where there are none."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    return list(_sentences(prompts, label, kind))


def class_combinations(prompts: PromptSet, label: str) -> list[str]:
    """All combinations of a label's parts, in the order of the file, joined with single spaces.

    Empty parts leave their space, as in the released code of GLoRIA; strip them where that matters.
    """
    if label not in prompts.combinations:
        known = ", ".join(prompts.combinations) or "none"
        raise PromptError(f"prompt set {prompts.name!r} has no combinations for {label!r}; it has: {known}")
    return [" ".join(parts) for parts in itertools.product(*prompts.combinations[label].values())]


def gloria_class_prompts(n: int = 5, seed: int = 6) -> dict[str, list[str]]:
    """n prompts for each of the five competition findings, as GLoRIA's `generate_chexpert_class_prompts(n)` gives
    them on its first call, when the global generator is seeded with 6 by the import; here no global state is read.

    Raises PromptError where a class has fewer than n combinations (Cardiomegaly has 15).
    """
    prompts = _gloria()
    generator = random.Random(seed)
    result = {}
    for label in prompts.combinations:
        candidates = class_combinations(prompts, label)
        if not 0 < n <= len(candidates):
            raise PromptError(f"{label} has {len(candidates)} prompts, {n} are asked for")
        result[label] = generator.sample(candidates, n)
    return result


@cache
def _gloria() -> PromptSet:
    return load_prompts("chexpert_gloria")


def _sentences(prompts: PromptSet, label: str, kind: str) -> list[str]:
    if label not in prompts.classes:
        raise PromptError(f"prompt set {prompts.name!r} does not know {label!r}; it has: {', '.join(prompts.classes)}")
    found = prompts.classes[label][kind]
    if not found:
        raise PromptError(f"prompt set {prompts.name!r} has no {kind!r} sentence for {label!r}; add one to its file")
    return found


def _parse(text: str, *, source: str) -> PromptSet:
    """A checked prompt set; a class may lack a kind (it is then empty), but holds no other keys."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise PromptError(f"{source}: not JSON ({error})") from error
    known = {"name", "attribution", "classes", "combinations"}
    if not isinstance(data, dict) or not isinstance(data.get("classes"), dict) or not data["classes"]:
        raise PromptError(f"{source}: a prompt set is an object with 'classes': {{label: {{'pos': [...], ...}}}}")
    if set(data) - known:
        raise PromptError(f"{source}: unknown key {min(set(data) - known)!r}; known: {', '.join(sorted(known))}")
    classes = {}
    for label, kinds in data["classes"].items():
        if not isinstance(kinds, dict) or set(kinds) - set(KINDS):
            raise PromptError(f"{source}: {label!r} must hold lists named {', '.join(KINDS)}, it holds {kinds!r:.60}")
        classes[label] = {kind: _strings(kinds.get(kind, []), f"{source}: {label!r}, {kind!r}") for kind in KINDS}
    combinations = {
        label: {part: _strings(values, f"{source}: {label!r}, {part!r}", empty=True) for part, values in parts.items()}
        for label, parts in data.get("combinations", {}).items()
    }
    for label, parts in combinations.items():
        sentences = (" ".join(" ".join(chosen).split()) for chosen in itertools.product(*parts.values()))
        kinds = classes.setdefault(label, {kind: [] for kind in KINDS})
        kinds["pos"] = kinds["pos"] or list(dict.fromkeys(sentences))
    return PromptSet(data.get("name", Path(source).stem), classes, data.get("attribution", ""), combinations)


def _strings(values: object, where: str, *, empty: bool = False) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(v, str) and (empty or v.strip()) for v in values):
        raise PromptError(f"{where} must be a list of sentences, it is {values!r:.60}")
    return values
