"""Which text each study of a dataset is read with: a section of its report, or sentences for its labels."""

from dataclasses import dataclass
from typing import Literal

import pandas as pd
from transformers import PreTrainedTokenizerFast

from gloria_core.data.manifest import finding_columns
from gloria_core.data.prompts import PromptSet, prompts_for
from gloria_core.data.tokenizer import load_tokenizer, train_wordpiece

Section = Literal["impression", "findings", "both"]


@dataclass(frozen=True)
class Texts:
    """The studies `frame` that have a text: their `section`, or, where it is empty, sentences from `prompts`.

    `notes`: one sentence for each thing that was chosen or left out.
    """

    frame: pd.DataFrame
    section: Section
    prompts: PromptSet | None
    notes: list[str]

    def split(self, name: str) -> pd.DataFrame:
        """Its rows of split `name`; there may be none."""
        return self.frame[self.frame["split"] == name]

    def first(self, n: int) -> pd.DataFrame:
        """n rows to try things on: of validation, or where it has fewer, of training and test, too."""
        return pd.concat([self.split(name) for name in ("valid", "train", "test")]).head(n)

    def tokenizer(self, name: str = "") -> PreTrainedTokenizerFast:
        """The tokenizer `name` (see `load_tokenizer`), or a WordPiece vocabulary of these texts.

        The vocabulary is learned from both sections of the training reports (of all reports, where training has none)
        and from the sentences for labels.
        """
        if name:
            return load_tokenizer(name)
        train = self.split("train")
        sections = (train if len(train) else self.frame)[["findings", "impression"]].to_numpy().ravel()
        kinds = self.prompts.classes.values() if self.prompts else ()
        made = [sentence for kind in kinds for sentences in kind.values() for sentence in sentences]
        return train_wordpiece([*(text for text in sections if text.strip()), *made])


def choose_texts(
    frame: pd.DataFrame, dataset: str, *, section: Section | Literal[""] = "", usual: Section, prompts: str = ""
) -> Texts:
    """The texts of a manifest frame; an empty `section` or `prompts` is chosen from the data.

    section: `usual`, or the section that has text where `usual` has none. Studies in which it is empty are left out.
    prompts: none where some study has text; else `prompts_for` this `dataset`. With prompts, only studies without
    any label are left out. Raises PromptError for an unknown prompt set.
    """
    n, notes, labels = len(frame), [], finding_columns(frame)
    has = {name: frame[name].str.strip() != "" for name in ("impression", "findings")}
    has["both"] = has["impression"] | has["findings"]
    chosen = section or next((name for name in (usual, "impression", "findings") if has[name].any()), usual)
    if not section and chosen != usual:
        notes.append(f"No study has text in its {usual}; the {chosen} is read.")
    usable, prompt_set = has[chosen], None
    what = "findings and impression" if chosen == "both" else chosen
    if prompts or not usable.any():
        prompt_set = prompts_for(dataset, labels, prompts)
        made = ~usable & frame[labels].notna().any(axis=1)
        notes.append(
            f"{made.sum()} of {n} studies have no {what}: their text is sentences for their labels, of the prompt set "
            f"{prompt_set.name!r}."
        )
        usable, what = usable | made, f"{what} and no label"
    if not usable.all():
        notes.append(f"{n - usable.sum()} of {n} studies have no {what}; they are left out.")
    return Texts(frame[usable], chosen, prompt_set, notes)
