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

Nobody writes paths. A parameter that is left blank gets the file of the run that makes it:

| parameter    | is the file           | of the run of        | with the same            |
|--------------|-----------------------|----------------------|--------------------------|
| `manifest`   | manifest.csv          | 01_data_preparation  | dataset                  |
| `checkpoint` | checkpoints/best.pt   | 02_pretraining       | objective, seed          |

"The same" holds for parameters that both notebooks have; a `dataset` left blank agrees with any. When several runs are
left, every further parameter in which they differ must agree, too. A stage reads from stages above it;
09_paper_tables reads them all. `out`, `study` and `run_id` are filled in by the runner. Paths that *are* written are
relative to the repository root. With `model`, a fine-tuned model that is scored as it is, no checkpoint is filled in.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from gloria_core.data.files import atomic_write, content_hash
from gloria_core.study import parameters as notebook_parameters
from gloria_core.study.parameters import ParameterError, Parameters, unknown
from gloria_core.study.paths import RUNS, STUDIES, repository_root
from gloria_core.study.provenance import notebook_fingerprint, path_fingerprint

# Parameters that the runner fills in, never a study file.
FILLED = ("out", "study", "run_id")
COLLECTOR = "09_paper_tables"
# Parameters that hold the file of another run: its notebook, the file, and the parameters in which both agree.
SOURCES = {
    "manifest": ("01_data_preparation", "manifest.csv", ("dataset",)),
    "checkpoint": ("02_pretraining", "checkpoints/best.pt", ("objective", "seed")),
}
PATHS = (*SOURCES, "data_root", "model")


class StudyError(ValueError):
    """A study file that does not say what to run. The message names the file, the key and what is near."""


class Resources(BaseModel):
    """What a run may use: processor threads, and on a cluster minutes, memory and GPUs; 0 is not stated."""

    model_config = ConfigDict(extra="forbid", strict=True)
    threads: PositiveInt = 1
    minutes: NonNegativeInt = 0
    memory_mb: NonNegativeInt = 0
    gpus: NonNegativeInt = 0


class Stage(Resources):
    """Runs of one notebook: `parameters` of all of them, and one run for each combination in `grid`."""

    notebook: str
    parameters: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}


class StudyFile(Resources):
    """A study file. Resources count for every stage that does not state its own."""

    study: str = Field(pattern=r"^[A-Za-z0-9][\w-]*$")
    description: str = ""
    common: dict[str, Any] = {}
    stages: list[Stage] = Field(min_length=1)


def parse(text: str) -> Any:
    """One YAML 1.2 value, e.g. of a command line: 5e-5 is a number, and a key that is there twice is an error."""
    return YAML(typ="safe", pure=True).load(text)


def read_study(path: Path) -> StudyFile:
    """The content of a study file. Raises `StudyError` naming line or key."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        marked = isinstance(error, MarkedYAMLError) and error.problem_mark is not None
        raise StudyError(f"line {error.problem_mark.line + 1}: {error.problem}" if marked else str(error)) from None
    try:
        study = StudyFile.model_validate(content)
    except ValidationError as error:
        fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
        *outer, key = fault["loc"] or ["the file"]
        where = f"stage {outer[1] + 1}" if len(outer) > 1 else "the study"
        if fault["type"] == "extra_forbidden":
            known = (Stage if outer else StudyFile).model_fields
            raise StudyError(unknown("key", key, known, where=where)) from None
        raise StudyError(f"{where}, `{key}`: {fault['msg']}, not {fault['input']!r}") from None
    if study.study != path.stem:
        raise StudyError(f"`study: {study.study}` must be the file's name, {path.stem!r}")
    return study


class PlannedRun(Resources):
    """One notebook with one set of parameters.

    `run_id` names the folder and is the same on every machine. `parameters` are all of the notebook's, paths relative
    to the repository root. `fingerprint` changes when a result would be stale: with the parameters, the code cells of
    the notebook, the data it is given, or any run in `needs`.
    """

    model_config = ConfigDict(frozen=True)
    run_id: str
    notebook: str
    parameters: dict[str, Any]
    needs: tuple[str, ...]
    fingerprint: str

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
    runs: tuple[PlannedRun, ...]

    @property
    def folder(self) -> Path:
        return self.root / RUNS / self.study

    def __iter__(self) -> Iterator[PlannedRun]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, run_id: str) -> PlannedRun:
        for run in self.runs:
            if run.run_id == run_id:
                return run
        raise StudyError(unknown("run", run_id, [run.run_id for run in self.runs], where=self.study))

    def write(self) -> None:
        """Write plan.json: the runs that belong to the study now. Folders of older plans no longer count."""
        atomic_write(self.folder / "plan.json", TypeAdapter(Plan).dump_json(self, indent=1))

    def check_data(self, runs: Sequence[PlannedRun]) -> None:
        """Raise `StudyError` where one of `runs` reads a folder that is missing or lacks the tables of its dataset."""
        from gloria_core.data import manifest, sources  # slow to import

        for run in runs:
            path, dataset = run.parameters.get("data_root"), run.parameters.get("dataset", "phantom")
            if path is None or dataset == "phantom":
                continue
            what = "no folder is given"
            try:
                if path:
                    sources.check_folder(
                        dataset, self.root / Path(path).expanduser(), run.parameters.get("options", {})
                    )
                    continue
            except manifest.ManifestError as error:
                what = str(error)
            raise StudyError(
                f"{run.notebook} reads the radiographs of {dataset}, but {what}: run it with "
                f"`make study STUDY={self.study} DATA=/path`, with GLORIA_DATA=/path, or write data_root in {self.file}"
            )


def read_plan(path: str | Path) -> Plan:
    """What `Plan.write` wrote. Raises `StudyError` where that cannot be read."""
    try:
        return TypeAdapter(Plan).validate_json(Path(path).read_bytes())
    except (OSError, ValidationError) as error:
        raise StudyError(f"{path} is no plan of a study: {error}") from None


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
    """Read a study file and check all of it: names, types, which run reads which. Nothing is run.

    `overrides` replace the value of a parameter in every notebook that has it. `data_root` is the user's folder of
    datasets: it fills a blank parameter of that name, and a relative one lies below it. For the phantom that parameter
    stays blank: it is simulated, not read.
    Raises `StudyError` or `ParameterError`; the message names file, key and the nearest name.
    """
    path, overrides = Path(path).resolve(), dict(overrides or {})
    root = repository_root(path.parent)
    try:
        study = read_study(path)
        files = {file.stem: file for file in sorted((root / "notebooks").glob("*.ipynb"))}
        for stage in study.stages:
            if stage.notebook not in files:
                raise StudyError(unknown("notebook", stage.notebook, files, where="notebooks/"))
        notebooks = {stage.notebook: notebook_parameters.read(files[stage.notebook]) for stage in study.stages}
        known = sorted({name for parameters in notebooks.values() for name in parameters.types} - {*FILLED})
        for what, given in (("common", study.common), ("override", overrides)):
            for key in given:
                if key not in known:
                    raise ParameterError(unknown(f"{what} parameter", key, known, where="the notebooks"))
        runs: list[PlannedRun] = []
        for stage in study.stages:
            code = notebook_fingerprint(files[stage.notebook])
            names = set(Resources.model_fields)
            resources = study.model_dump(include=names) | stage.model_dump(include=names & stage.model_fields_set)
            for values in _combinations(study, stage, notebooks[stage.notebook], overrides, data_root):
                run = _planned(study.study, stage.notebook, values, runs, code, root, resources)
                if any(run.run_id == other.run_id for other in runs):
                    raise StudyError(f"two runs of {run.notebook} have the same parameters: {values}")
                runs.append(run)
        return Plan(path.stem, path, root, tuple(runs))
    except (StudyError, ParameterError) as error:
        raise type(error)(f"{path.name}: {error}") from None


def _combinations(
    study: StudyFile, stage: Stage, parameters: Parameters, overrides: Mapping[str, Any], data_root: str
) -> Iterator[dict[str, Any]]:
    """The parameters of each run of one stage."""
    for key in (*stage.parameters, *stage.grid):
        if key in FILLED:
            raise StudyError(f"{stage.notebook}: {key!r} is filled in by the runner; leave it out")
        if key in stage.parameters and key in stage.grid:
            raise StudyError(f"{stage.notebook}: {key!r} is in `parameters` and in `grid`; give it in one of them")
    for key, values in stage.grid.items():
        if not values or any(values.count(value) > 1 for value in values):
            raise StudyError(f"{stage.notebook}: `grid: {key}` must be a list of different values, not {values!r}")
    for combination in product(*stage.grid.values()):
        given = {key: value for key, value in study.common.items() if key in parameters.types}
        given |= stage.parameters | dict(zip(stage.grid, combination, strict=True))
        given |= {key: value for key, value in overrides.items() if key in parameters.types}
        values = parameters.check(given)
        if "data_root" in values:
            simulated = values.get("dataset", study.common.get("dataset", "phantom")) == "phantom"
            place = str(Path(data_root) / values["data_root"]) if data_root else values["data_root"]
            values["data_root"] = "" if simulated else place
        yield values


def _planned(
    study: str,
    notebook: str,
    values: Mapping[str, Any],
    above: Sequence[PlannedRun],
    code: str,
    root: Path,
    resources: Mapping[str, int],
) -> PlannedRun:
    """The run with these parameters, its name, and the files of the runs `above` that it reads."""
    wanted = [key for key, (maker, _, _) in SOURCES.items() if values.get(key) == "" and notebook != maker]
    wanted = [key for key in wanted if key != "checkpoint" or not values.get("model")]
    makers = {key: _maker(key, notebook, values, above) for key in wanted}
    needs = list(above) if notebook == COLLECTOR else list(makers.values())
    upstream = sorted({run.run_id for run in needs})
    identity = {key: value for key, value in values.items() if key not in (*FILLED, *PATHS)}
    # a path means another place on another machine: its name counts here, its content in the fingerprint
    given = [key for key in (*SOURCES, "model") if values.get(key)]
    # the files of runs have one name: that of the run counts too
    identity |= {key: "/".join(Path(values[key]).parts[-3 if key == "model" else -1 :]) for key in given}
    objective, seed = identity.get("objective"), identity.get("seed")
    short = content_hash([notebook, identity, upstream], digits=8)
    parts = [notebook, objective, None if seed is None else f"s{seed}", short]
    run_id = "-".join(re.sub(r"[^\w.]", "_", str(part)) for part in parts if part not in (None, ""))
    data = {key: path_fingerprint(root, values[key]) for key in given}
    fingerprint = content_hash([run_id, code, data, sorted(run.fingerprint for run in needs)])
    files = {key: (RUNS / study / maker.run_id / SOURCES[key][1]).as_posix() for key, maker in makers.items()}
    filled = {"out": (RUNS / study / run_id).as_posix(), "study": study, "run_id": run_id}
    return PlannedRun(
        run_id=run_id,
        notebook=notebook,
        parameters={**values, **files} | {key: value for key, value in filled.items() if key in values},
        needs=tuple(upstream),
        fingerprint=fingerprint,
        **resources,
    )


def _maker(key: str, notebook: str, values: Mapping[str, Any], above: Sequence[PlannedRun]) -> PlannedRun:
    """The one of the runs `above` that makes the file `key` for `notebook`. Raises `StudyError` for none or several."""
    maker, _, same = SOURCES[key]
    left = [run for run in above if run.notebook == maker]
    if not left:
        raise StudyError(f"{notebook} reads a {key}, but no stage above it runs {maker}; add it or give `{key}`")
    shared = [name for name in (*same, *_differing(left)) if name in values and name in left[0].parameters]
    for name in shared:
        value = values[name]
        if (name == "dataset" and value == "") or (name not in same and len(left) == 1):
            continue
        there = ", ".join(dict.fromkeys(repr(run.parameters[name]) for run in left))
        left = [run for run in left if run.parameters[name] == value]
        if not left:
            wanted = f"{notebook} reads the {key} of {name} {value!r}, but {maker} is run for {name} {there}"
            raise StudyError(f"{wanted}; add that run to its grid")
    if len(left) > 1:
        raise StudyError(
            f"{notebook} could read the {key} of {len(left)} runs of {maker}, which differ in "
            f"{', '.join(_differing(left))}; give `{key}`, or one run for each"
        )
    return left[0]


def _differing(runs: Sequence[PlannedRun]) -> list[str]:
    first = runs[0].parameters
    names = [name for name in first if name not in (*FILLED, *PATHS)]
    return [name for name in names if any(run.parameters[name] != first[name] for run in runs)]
