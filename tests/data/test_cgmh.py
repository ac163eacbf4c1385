"""Tables in the form of CXR-CLIP-CGMH, made here: what is read from them, and what is said of a faulty one."""

import json
import re

import numpy as np
import pytest
from owner_trees import adapter
from PIL import Image

from gloria_core.data import sources
from gloria_core.data.manifest import ManifestError, read_manifest, write_manifest
from gloria_core.data.prompts import PromptError, load_prompts
from gloria_core.data.sources.cgmh import CGMH_LABELS

prepare = adapter("cgmh")

TASKS = ["Pneumothorax", "Foreign body"]
TRAIN = """index,image,text_label
0,"['img/0.png', 'img/1.png']","['Pneumothorax', 'Foreign body']"
1,"['img/2.png']",[]
2,img/3.png,Pneumothorax
"""
TEST = """index,image,Pneumothorax,Foreign body,text
0,"['img/4.png']",1,0,A large pneumothorax.
1,"['img/5.png']",0.0,1,
"""


def make_tree(root, *, train=TRAIN, test=TEST, valid=None, n=8):
    (root / "img").mkdir(parents=True)
    for number in range(n):
        Image.new("L", (4, 4), number).save(root / "img" / f"{number}.png")
    for name, text in (("train", train), ("test", test), ("valid", valid)):
        if text is not None:
            (root / f"{name}.csv").write_text(text)
    return root


def frame_of(root, **options):
    return prepare(root, **({"tasks": TASKS} | options)).set_index("study_id")


def fault(root, **options):
    with pytest.raises(ManifestError) as caught:
        frame_of(root, **options)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ reading


def test_tables_become_a_manifest(tmp_path):
    root = make_tree(tmp_path, valid="index,image,text_label\n5,img/7.png,[]\n")
    frame = frame_of(root, valid="valid.csv")
    assert frame["split"].to_dict() == {
        "train-0": "train",
        "train-1": "train",
        "train-2": "train",
        "valid-5": "valid",
        "test-0": "test",
        "test-1": "test",
    }
    assert frame.loc["train-0", ["images", "views"]].tolist() == ["img/0.png;img/1.png", "FRONTAL;FRONTAL"]
    assert frame.loc["train-2", "images"] == "img/3.png"
    assert frame[TASKS].loc["train-0"].tolist() == [1, 1]
    assert frame[TASKS].loc["train-1"].tolist() == [0, 0]  # what is not listed is absent
    assert frame[TASKS].loc["train-2"].tolist() == [1, 0]
    assert frame[TASKS].loc["test-1"].tolist() == [0, 1]
    assert frame.loc["test-0", "impression"] == "A large pneumothorax."
    write_manifest(frame.reset_index(), tmp_path / "manifest.csv")
    assert len(read_manifest(tmp_path / "manifest.csv", root=tmp_path)) == 6


def test_the_package_finds_the_source(tmp_path):
    assert "cgmh" in sources.available()
    frame = sources.prepare("cgmh", make_tree(tmp_path), {"tasks": TASKS, "test": ""})
    assert set(frame["split"]) <= {"train", "valid"}
    with pytest.raises(TypeError, match="no option 'task'"):
        sources.prepare("cgmh", tmp_path, {"task": TASKS})


def test_columns_as_pandas_writes_them_and_both_spellings(tmp_path):
    train = ",image,text_label\n7,\"['img/0.png']\",\"['Pigtail malpositon']\"\n"
    header = ",image,text," + ",".join(CGMH_LABELS).replace("Pigtail malposition", "Pigtail malpositon")
    test = f"{header}\n3,img/1.png,Fine.,{','.join('1' if 'Pigtail mal' in name else '0' for name in CGMH_LABELS)}\n"
    frame = prepare(make_tree(tmp_path, train=train, test=test)).set_index("study_id")
    assert list(frame.index) == ["train-7", "test-3"]
    assert (frame["Pigtail malposition"] == 1).all()
    assert "Pigtail malpositon" not in frame
    assert (frame[[name for name in CGMH_LABELS if name != "Pigtail malposition"]] == 0).all(axis=None)


def test_paths_of_another_machine(tmp_path):
    train = TRAIN.replace("img/", "/data/cgmh/img/")
    root = make_tree(tmp_path, train=train)
    assert "row 2, column 'image'" in fault(root, test="")
    assert "is absolute" in fault(root, test="")
    frame = frame_of(root, test="", path_prefix="/data/cgmh")
    assert frame.loc["train-0", "images"] == "img/0.png;img/1.png"
    (root / "train.csv").write_text(TRAIN.replace("img/", f"{root}/img/"))
    assert frame_of(root, test="").loc["train-0", "images"] == "img/0.png;img/1.png"
    assert "paths begin with path_prefix '/other'" in fault(root, test="", path_prefix="/other")


def test_a_list_is_data_and_never_run(tmp_path):
    """A cell that `eval` would run is refused."""
    code = f"[open('{tmp_path}/gone', 'w').name]"
    text = fault(make_tree(tmp_path, train=f'image,text_label\n"{code}",[]\n'))
    assert "train.csv, row 2, column 'image'" in text
    assert "is no list" in text
    assert not (tmp_path / "gone").exists()


# ------------------------------------------------------------------------------------------------------- splits


def many(n, patient=None):
    rows = [
        f"img/{i}.png,{'Pneumothorax' if i % 3 else '[]'}" + (f",{patient(i)}" if patient else "") for i in range(n)
    ]
    return "image,text_label" + (",patient_id" if patient else "") + "\n" + "\n".join(rows) + "\n"


def test_a_tenth_becomes_the_validation_split(tmp_path):
    root = make_tree(tmp_path, train=many(60), n=60)
    frame = frame_of(root, test="")
    assert frame["split"].value_counts().to_dict() == {"train": 54, "valid": 6}
    assert frame["split"].equals(frame_of(root, test="")["split"])
    assert not frame["split"].equals(frame_of(root, test="", seed=1)["split"])
    assert frame["patient_id"].tolist() == frame.index.tolist()
    assert abs(frame[frame["split"] == "valid"]["Pneumothorax"].mean() - 2 / 3) < 0.2


def test_patients_stay_together(tmp_path):
    root = make_tree(tmp_path, train=many(60, patient=lambda i: f"p{i // 4}"), n=60)
    frame = frame_of(root, test="")
    assert (frame.groupby("patient_id")["split"].nunique() == 1).all()
    assert set(frame["split"]) == {"train", "valid"}
    (root / "test.csv").write_text("image,Pneumothorax,Foreign body,text,patient_id\nimg/59.png,1,0,x,p99\n")
    assert "image is in two splits" in fault(root)
    Image.new("L", (4, 4)).save(root / "img" / "60.png")
    (root / "test.csv").write_text("image,Pneumothorax,Foreign body,text,patient_id\nimg/60.png,1,0,x,p3\n")
    assert "patient in two splits" in fault(root)


# -------------------------------------------------------------------------------------------------------- texts


def test_the_package_has_sentences_for_every_label():
    prompts = load_prompts("cgmh")
    assert set(CGMH_LABELS) < set(prompts.classes)
    for name in CGMH_LABELS:
        assert all(prompts.classes[name][kind] for kind in ("pos", "neg", "unc")), name
    assert prompts.classes["No Finding"]["pos"]


def test_texts_are_drawn_from_prompts(tmp_path):
    root = make_tree(tmp_path, train=many(60), n=60)
    frame, prompts = frame_of(root, test=""), load_prompts("cgmh")
    train, valid = frame[frame["split"] == "train"], frame[frame["split"] == "valid"]
    present = prompts.classes["Pneumothorax"]["pos"]
    assert set(train[train["Pneumothorax"] == 1]["impression"]) == set(present)
    assert set(train[train["Pneumothorax"] == 0]["impression"]) <= set(prompts.classes["No Finding"]["pos"])
    assert set(valid[valid["Pneumothorax"] == 1]["impression"]) == {present[0]}
    assert frame["impression"].equals(frame_of(root, test="")["impression"])
    negative = frame_of(root, test="", n_negative=1)
    texts = negative[(negative["split"] == "train") & (negative["Pneumothorax"] == 1)]["impression"]
    assert all(any(sentence in text for sentence in prompts.classes["Foreign body"]["neg"]) for text in texts)
    assert set(frame_of(root, test="", prompts="")["impression"]) == {""}


def test_reports_stay_and_gaps_are_filled(tmp_path):
    frame = frame_of(make_tree(tmp_path))
    assert frame.loc["test-0", "impression"] == "A large pneumothorax."
    assert frame.loc["test-1", "impression"] == load_prompts("cgmh").classes["Foreign body"]["pos"][0]


FORK = {
    "Pneumothorax": {"pos": ["Air!"], "neg": ["No air."], "unc": ["Air?"]},
    "Foreign body": {"pos": ["A coin."], "neg": [""], "unc": [""]},
}


def test_own_prompts_in_the_forks_form(tmp_path):
    root = make_tree(tmp_path)
    (root / "own.json").write_text(json.dumps(FORK | {"No Finding": {"pos": ["Nothing."]}}))
    frame = frame_of(root, prompts="own.json", n_negative=2)
    assert {*frame.loc["train-0", "impression"].split(". ")} <= {
        "Air! A coin.",
        "A coin.",
        "A coin. Air!",
        "A coin",
        "Air!",
    }
    assert frame.loc["train-2", "impression"] == "Air!"  # "Foreign body" has no sentence for absence: passed over
    assert frame.loc["train-1", "impression"] in ("No air. Nothing.", "Nothing. No air.", "Nothing.")
    (root / "ours.json").write_text(json.dumps({"name": "x", "classes": FORK | {"Foreign body": {"pos": ["A pin."]}}}))
    assert frame_of(root, prompts="ours.json", train="").loc["test-1", "impression"] == "A pin."


def test_faulty_prompts(tmp_path):
    root = make_tree(tmp_path)
    (root / "own.json").write_text(json.dumps(FORK))
    with pytest.raises(PromptError, match=r"study train-1: .*'No Finding'"):
        frame_of(root, prompts="own.json")
    (root / "own.json").write_text('{"Pneumothorax": {"positive": ["x"]}}')
    with pytest.raises(PromptError, match=r"(?s)own.json cannot be read .*Pneumothorax.positive"):
        frame_of(root, prompts="own.json")
    (root / "own.json").write_text("[1")
    with pytest.raises(PromptError, match=r"own.json cannot be read"):
        frame_of(root, prompts="own.json")
    with pytest.raises(PromptError, match=r"names of sets: .*cgmh"):
        frame_of(root, prompts="cgmhh")


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("image,text_label\nimg/0.png,[]\n,[]\n", "train.csv, row 3, column 'image': '' is no list of texts"),
        ("image,text_label\n[],[]\n", "column 'image': 1 bad value (row 2: nan); a study has at least one image"),
        ("image,text_label\n[img/0.png,[]\n", "row 2, column 'image': '[img/0.png' is no list"),
        ("image,text_label\n[1],[]\n", "row 2, column 'image': '[1]' is no list of texts"),
        ("image,text_label\n../x.png,[]\n", "row 2, column 'image': path '../x.png' escapes"),
        ("image,text_label\nimg/0.png,\n", "row 2, column 'text_label': '' is no list of texts; write it as"),
        ("image,text_label\nimg/0.png,Pneumotorax\n", "row 2, column 'text_label': label 'Pneumotorax' is none"),
        ("image,text_label\nimg/0.png,Pneumotorax\n", "Did you mean 'Pneumothorax'?"),
        ("image,text_label\nimg/0.png,Edema\n", "Other labels are given as `tasks`"),
        ("image,text_labels\nimg/0.png,[]\n", "lacks column 'text_label'. Did you mean 'text_labels'?"),
        ("index,image,text_label\n1,img/0.png,[]\n1,img/1.png,[]\n", "column 'index': 1 bad value (row 3: '1')"),
        ("image,text_label\nimg/0.png,[]\nimg/99.png,[]\n", "row 3 (study 'train-1'), column 'images'"),
        ("image,text_label\n", "has no rows below its header"),
    ],
)
def test_faults_name_file_row_and_remedy(tmp_path, train, message):
    text = fault(make_tree(tmp_path, train=train))
    assert message in text
    assert "train.csv" in text


def test_faults_of_the_test_table(tmp_path):
    root = make_tree(tmp_path, test=TEST.replace(",1,0,", ",2,0,"))
    assert "test.csv, column 'Pneumothorax': 1 bad value (row 2: '2'); a label of the test table" in fault(root)
    (root / "test.csv").write_text(TEST.replace("Foreign body", "Foreign bodies"))
    assert re.search(r"test.csv.*lacks column 'Foreign body'. Did you mean 'Foreign bodies'\?", fault(root))
    (root / "test.csv").unlink()
    assert "test.csv: the table of test" in fault(root)


def test_missing_files_can_be_left_out(tmp_path):
    root = make_tree(tmp_path, n=3)
    assert "on_error='exclude' keeps what is there" in fault(root)
    (root / "img" / "4.png").write_bytes((root / "img" / "0.png").read_bytes())
    frame = prepare(root, tasks=TASKS, on_error="exclude")
    assert frame["study_id"].tolist() == ["train-0", "train-1", "test-0"]
    excluded = frame.attrs["excluded"]
    assert [(entry["study_id"], entry["row"]) for entry in excluded] == [("test-1", 3), ("train-2", 4)]


def test_wrong_options(tmp_path):
    root = make_tree(tmp_path)
    assert "is not a folder" in fault(root / "nowhere")
    for options, message in (
        ({"on_error": "skip"}, "on_error"),
        ({"tasks": []}, "tasks"),
        ({"tasks": ["Pneumothorax", "Pneumothorax"]}, "tasks"),
        ({"train": "", "test": ""}, "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            frame_of(root, **options)
    assert np.isfinite(frame_of(root)["label_rank"]).all()
