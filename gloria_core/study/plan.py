"""From a study file to a list of runs: which notebook, with which parameters, after which others.

    study: quickstart
    common: {dataset: phantom}            # given to every stage whose notebook has a parameter of that name
    stages:
      - notebook: 01_data_preparation
      - notebook: 02_pretraining
        parameters: {epochs: 3}
        grid: {objective: [gloria, random], seed: [0, 1]}      # every combination is one run
        threads: 2
      - notebook: 07_zero_shot
        grid: {objective: [gloria, random], seed: [0, 1]}

Nobody writes paths. A parameter `manifest` or `checkpoint` that is left blank gets the file of the run that makes it
(see `gloria_core.study.plan`); `out`, `study` and `run_id` are filled by the runner. Paths that *are* written are
relative to the repository root. This module starts nothing and imports neither torch nor pandas.

YAML as a scientist reads it: 5e-5 is a number, and a key that is there twice is a mistake.

Which run makes the file that another one reads. A convention in place of paths in study files.

| parameter left blank | is the file           | of the run of        | with the same            |
|----------------------|-----------------------|----------------------|--------------------------|
| `manifest`           | manifest.csv          | 01_data_preparation  | dataset                  |
| `checkpoint`         | checkpoints/best.pt   | 02_pretraining       | objective, seed          |

"The same" holds for parameters that both notebooks have; a `dataset` left blank agrees with any. When several runs are
left, every further parameter in which they differ must agree, too. 09_paper_tables reads every other run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from gloria_core.study import parameters as notebook_parameters
from gloria_core.study.parameters import ParameterError, unknown
from gloria_core.study.paths import RUNS, STUDIES, repository_root, write_atomically
from gloria_core.study.provenance import notebook_signature, path_signature


class StudyError(ValueError):
    """A study file that does not say what to run. The message names the file, the key and what is near."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader follows YAML 1.1, where `5e-5` is text. And it keeps the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `StudyError` with file and line when there is none."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise StudyError(f"{path.name}{line}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path.name} must hold `key: value` lines, e.g. `study: {path.stem}`")
    return content


def parse(text: str) -> Any:
    """One YAML value, e.g. of a command line."""
    return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader: builds plain values only


FILLED = ("out", "study", "run_id")
"""Parameters that the runner fills, never a study file."""
COLLECTOR = "09_paper_tables"


@dataclass(frozen=True)
class Draft:
    """A run that has no name yet: `values` are all parameters of its notebook."""

    notebook: str
    values: Mapping[str, Any]
    resources: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """`file` in the folder of the run of `notebook` that agrees in the parameters `same`."""

    notebook: str
    file: str
    same: tuple[str, ...]


PATHS = {
    "manifest": Source("01_data_preparation", "manifest.csv", ("dataset",)),
    "checkpoint": Source("02_pretraining", "checkpoints/best.pt", ("objective", "seed")),
    "data_root": Source("", "", ()),  # comes from outside: a folder of radiographs
}
"""Parameters that hold paths, and who makes them."""


def needs_of(index: int, drafts: Sequence[Draft]) -> dict[str, int]:
    """For each file that draft `index` reads, the index of the draft that makes it. Raises `StudyError`.

    Keys are parameter names; the collector, which reads folders and not one file, has a key for each other run.
    """
    draft = drafts[index]
    if draft.notebook == COLLECTOR:
        return {f"run {other}": other for other in range(len(drafts)) if drafts[other].notebook != COLLECTOR}
    wanted = [key for key, source in PATHS.items() if source.notebook and draft.values.get(key) == ""]
    return {key: _maker(key, draft, drafts) for key in wanted if draft.notebook != PATHS[key].notebook}


def _maker(key: str, draft: Draft, drafts: Sequence[Draft]) -> int:
    source = PATHS[key]
    makers = [index for index, other in enumerate(drafts) if other.notebook == source.notebook]
    if not makers:
        raise StudyError(f"{draft.notebook} reads a {key}, but no stage runs {source.notebook}; add it or give `{key}`")
    agreed: list[str] = []
    left = makers
    names = [*source.same, *_differing([drafts[index] for index in makers])]
    for name in dict.fromkeys(names):
        if name in source.same or len(left) > 1:
            matching = [index for index in left if _agree(name, draft, drafts[index])]
            if not matching:
                there = sorted({repr(drafts[index].values[name]) for index in left})
                have = " and ".join([f"{name} {draft.values[name]!r}", *agreed])
                raise StudyError(
                    f"{draft.notebook} reads the {key} of {have}, but {source.notebook} is run for "
                    f"{name} {', '.join(there)}; add that run to its grid"
                )
            left = matching
            if name in draft.values and name in drafts[left[0]].values:
                agreed.append(f"{name} {draft.values[name]!r}")
    if len(left) > 1:
        raise StudyError(
            f"{draft.notebook} could read the {key} of {len(left)} runs of {source.notebook}, which differ in "
            f"{', '.join(_differing([drafts[index] for index in left]))}; give `{key}`, or one run for each"
        )
    return left[0]


def _agree(name: str, draft: Draft, other: Draft) -> bool:
    if name not in draft.values or name not in other.values:
        return True
    return draft.values[name] == other.values[name] or (name == "dataset" and draft.values[name] == "")


def _differing(drafts: Sequence[Draft]) -> list[str]:
    first = drafts[0].values
    return [name for name in first if any(other.values.get(name) != first[name] for other in drafts[1:])]


RESOURCES = ("threads", "minutes", "memory_mb", "gpus")
"""What a stage may ask for: processor threads, a time limit, and for a cluster memory (MB) and GPUs."""
_STUDY_KEYS = ("study", "description", "common", "stages", *RESOURCES)
_STAGE_KEYS = ("notebook", "parameters", "grid", *RESOURCES)


@dataclass(frozen=True)
class Run:
    """One notebook with one set of parameters.

    `run_id` names the folder and is the same on every machine. `parameters` are all of the notebook's, paths relative
    to the repository root. `fingerprint` changes when a result would be stale: with the parameters, the code cells of
    the notebook, the data it is given, or any run in `needs`.
    """

    run_id: str
    notebook: str
    parameters: dict[str, Any]
    needs: tuple[str, ...]
    fingerprint: str
    threads: int = 1
    minutes: int = 0  # 0: no limit
    memory_mb: int = 0  # 0: not stated
    gpus: int = 0

    @property
    def stamp(self) -> str:
        """Name of the hidden file in the run's folder that tells Snakemake: done, and still fresh."""
        return f".done-{self.fingerprint}"


@dataclass(frozen=True)
class Plan:
    """All runs of a study, each after those that it needs."""

    study: str
    file: Path
    root: Path
    runs: tuple[Run, ...]

    @property
    def folder(self) -> Path:
        return self.root / RUNS / self.study

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, run_id: str) -> Run:
        for run in self.runs:
            if run.run_id == run_id:
                return run
        raise StudyError(unknown("run", run_id, [run.run_id for run in self.runs], where=self.study))

    def write(self) -> Path:
        """Writes plan.json, the list of what belongs to the study now; older folders beside it no longer count."""
        content = {"study": self.study, "runs": [asdict(run) for run in self.runs]}
        write_atomically(self.folder / "plan.json", json.dumps(content, indent=1) + "\n")
        return self.folder / "plan.json"


def study_file(name: str, root: Path | None = None) -> Path:
    """The file of a study given by name (`quickstart`) or by path. Raises `StudyError` with the nearest name."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise StudyError(f"there is no study file {name}")
        return Path(name).resolve()
    folder = (root or repository_root()) / STUDIES
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise StudyError(unknown("study", name, known, where=f"{STUDIES}/"))
    return folder / f"{name}.yaml"


def load_study(path: str | Path, *, overrides: Mapping[str, Any] | None = None, data_root: str = "") -> Plan:
    """Reads a study file and checks all of it: names, types, wiring. Nothing is run.

    `overrides` replace the value of a parameter in every notebook that has it. `data_root` fills a blank parameter of
    that name, and a relative one lies below it; as an override it also takes the place of an absolute one. For the
    phantom that parameter stays blank: it is drawn, not read, and nobody's folder is touched.
    Raises `StudyError` or `ParameterError`; the message names file, key and the nearest name.
    """
    path = Path(path).resolve()
    root = repository_root(path.parent)
    content = read_mapping(path)
    try:
        _check_keys(content, _STUDY_KEYS, where=path.name, required=("study", "stages"))
        if content["study"] != path.stem or not re.fullmatch(r"[A-Za-z0-9][\w-]*", path.stem):
            raise StudyError(
                f"`study: {content['study']}` must be the file's name, {path.stem!r}, in letters and digits"
            )
        stages = content["stages"]
        if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages) or not stages:
            raise StudyError("`stages` must be a list, each with `- notebook: <name>`")
        for number, stage in enumerate(stages, start=1):
            _check_keys(stage, _STAGE_KEYS, where=f"stage {number}", required=("notebook",))
        common = _mapping(content, "common")
        _check_used("common", common, root, stages)
        _check_used("override", overrides or {}, root, stages)
        drafts = [draft for stage in stages for draft in _drafts(stage, common, overrides or {}, data_root, root)]
        if (overrides or {}).get("data_root") and not any(draft.values.get("data_root") for draft in drafts):
            raise StudyError("a data folder is given, but this study draws its images itself (dataset: phantom)")
        resources = {key: content[key] for key in RESOURCES if key in content}
        return Plan(path.stem, path, root, _finish(path.stem, drafts, resources, root))
    except (StudyError, ParameterError) as error:
        raise type(error)(f"{path.name}: {error}") from None


def _drafts(
    stage: Mapping[str, Any], common: Mapping[str, Any], overrides: Mapping[str, Any], data_root: str, root: Path
) -> Iterator[Draft]:
    """The runs of one stage, before they know of each other."""
    notebook = stage["notebook"]
    file = _notebook_file(notebook, root)
    known = notebook_parameters.read(file)
    fixed, grid = _mapping(stage, "parameters"), _mapping(stage, "grid")
    for key in (*fixed, *grid):
        if key in FILLED:
            raise StudyError(f"{notebook}: {key!r} is filled by the runner; leave it out")
        if key in fixed and key in grid:
            raise StudyError(f"{notebook}: {key!r} is in `parameters` and in `grid`; one of them")
    for key, values in grid.items():
        if not isinstance(values, list) or not values or any(values.count(value) > 1 for value in values):
            raise StudyError(f"{notebook}: `grid: {key}` must be a list of different values, not {values!r}")
    resources = {key: stage[key] for key in RESOURCES if key in stage}
    for combination in product(*grid.values()):
        given = {key: value for key, value in common.items() if key in known}
        given |= fixed | dict(zip(grid, combination, strict=True))
        given |= {key: value for key, value in overrides.items() if key in known and key != "data_root"}
        values = notebook_parameters.check(file, given)
        if "data_root" in values:
            drawn = values.get("dataset", common.get("dataset", "phantom")) == "phantom"
            values["data_root"] = "" if drawn else _folder(values["data_root"], overrides.get("data_root"), data_root)
        yield Draft(notebook, values, resources)


def _folder(written: str, typed: str | None, usual: str) -> str:
    """Where a dataset lies. Several of one study are folders with written names below the one that the user names."""
    if typed:
        return typed if Path(written).is_absolute() else str(Path(typed) / written)
    return str(Path(usual) / written) if usual else written


def _finish(study: str, drafts: list[Draft], common_resources: Mapping[str, int], root: Path) -> tuple[Run, ...]:
    """Orders the runs, gives them names, wires the files of one to the parameters of the next."""
    done: dict[int, Run] = {}
    needs = {index: needs_of(index, drafts) for index in range(len(drafts))}
    while len(done) < len(drafts):
        ready = [i for i in needs if i not in done and all(need in done for need in needs[i].values())]
        if not ready:
            raise StudyError("the stages wait for each other in a circle")
        for index in ready:
            run = _run(study, drafts[index], {key: done[need] for key, need in needs[index].items()}, root)
            if any(run.run_id == other.run_id for other in done.values()):
                raise StudyError(f"{run.notebook} is there twice with the same parameters: {_short(drafts[index])}")
            resources = _resources(dict(common_resources) | drafts[index].resources)
            done[index] = Run(**{**asdict(run), "needs": run.needs, **resources})
    return tuple(done.values())


def _run(study: str, draft: Draft, needs: Mapping[str, Run], root: Path) -> Run:
    upstream = sorted(run.run_id for run in needs.values())
    identity = {key: value for key, value in draft.values.items() if key not in (*FILLED, *PATHS)}
    # a path means another place on another machine: its name counts here, its content in the fingerprint
    identity |= {key: Path(draft.values[key]).name for key in ("manifest", "checkpoint") if draft.values.get(key)}
    short = sha256(_canonical([draft.notebook, identity, upstream])).hexdigest()[:8]
    objective, seed = identity.get("objective"), identity.get("seed")
    parts = [draft.notebook, objective, None if seed is None else f"s{seed}", short]
    run_id = "-".join(re.sub(r"[^\w.]", "_", str(part)) for part in parts if part not in (None, ""))
    values = dict(draft.values)
    for key, need in needs.items():
        if key in PATHS:
            values[key] = (RUNS / study / need.run_id / PATHS[key].file).as_posix()
    filled = {"out": (RUNS / study / run_id).as_posix(), "study": study, "run_id": run_id}
    values |= {key: value for key, value in filled.items() if key in values}
    data = {key: path_signature(root, draft.values[key]) for key in PATHS if draft.values.get(key)}
    code = notebook_signature(_notebook_file(draft.notebook, root))
    older = sorted(run.fingerprint for run in needs.values())
    fingerprint = sha256(_canonical([run_id, code, data, older])).hexdigest()[:16]
    return Run(run_id, draft.notebook, values, tuple(upstream), fingerprint)


def _notebook_file(notebook: Any, root: Path) -> Path:
    known = sorted(path.stem for path in (root / "notebooks").glob("*.ipynb"))
    if notebook not in known:
        raise StudyError(unknown("notebook", notebook, known, where="notebooks/"))
    return root / "notebooks" / f"{notebook}.ipynb"


def _check_keys(mapping: Mapping[str, Any], known: tuple[str, ...], *, where: str, required: tuple[str, ...]) -> None:
    for key in mapping:
        if key not in known:
            raise StudyError(unknown("key", key, known, where=where))
    for key in required:
        if key not in mapping:
            raise StudyError(f"{where} has no `{key}:`")


def _check_used(what: str, given: Mapping[str, Any], root: Path, stages: list[dict[str, Any]]) -> None:
    known = {name for stage in stages for name in notebook_parameters.read(_notebook_file(stage["notebook"], root))}
    for key in given:
        if key in FILLED:
            raise StudyError(f"{what}: {key!r} is filled by the runner; leave it out")
        if key not in known:
            raise ParameterError(unknown(f"{what} parameter", key, sorted(known), where="any notebook of this study"))


def _mapping(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise StudyError(f"`{key}` must hold `name: value` lines, not {value!r}")
    return value or {}


def _resources(given: Mapping[str, Any]) -> dict[str, int]:
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < (1 if key == "threads" else 0):
            raise StudyError(f"`{key}: {value}` must be a whole number")
    return dict(given)


def _short(draft: Draft) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in draft.values.items() if key not in FILLED)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8")
