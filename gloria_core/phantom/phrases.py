"""How radiologists say it: noun phrases, sentences and negations for each finding.

In noun phrases `{size}`, `{side}`, `{zone}` are filled from the finding; a leading `a:` marks a phrase that takes an
article. Sentences hold the phrase as `{p}` (with article: `{ap}`, capitalised: `{P}`). In whole sentences the words
that name the region stand in square brackets.
"""

from __future__ import annotations

SIZES = {  # by severity: below 0.42, below 0.72, above
    "Pleural Effusion": (("small", "trace", "minimal"), ("moderate", "moderate-sized"), ("large",)),
    "Pneumothorax": (("small", "tiny"), ("moderate",), ("large",)),
    "nodule": (("small", "8 mm", "tiny"), ("1.2 cm", ""), ("1.8 cm", "")),
    "mass": (("3 cm", ""), ("4 cm", ""), ("5 cm", "large")),
    "Support Devices": (("",), ("",), ("",)),
    "Fracture": (("minimally displaced", "nondisplaced"), ("", "mildly displaced"), ("displaced",)),
    "Lung Opacity": (("subtle", "faint"), ("", "mild"), ("", "extensive")),
    "Consolidation": (("mild", "focal"), ("", "focal"), ("dense", "extensive")),
    "Pneumonia": (("mild", "early"), ("",), ("extensive", "multifocal")),
    "Enlarged Cardiomediastinum": (("mild",), ("", "moderate"), ("marked",)),
    "": (("mild", "minimal", "slight"), ("moderate", ""), ("severe", "marked")),
}

NOUNS = {
    "plate": (
        "{size} {side} {zone} plate-like atelectasis",
        "{size} {side} {zone} linear atelectasis",
        "{size} {side} {zone} subsegmental atelectasis",
        "{size} discoid atelectasis in the {side} {zone}",
        "{size} atelectasis in the {side} {zone}",
    ),
    "basal": (
        "{size} {side} basilar atelectasis",
        "{size} {side} lower lobe atelectasis",
        "{size} {side} basal volume loss",
        "{size} atelectasis at the {side} lung base",
        "{size} compressive atelectasis at the {side} base",
    ),
    "heart": ("{size} cardiomegaly", "{size} enlargement of the cardiac silhouette", "{size} cardiac enlargement"),
    "lobar": (
        "{size} {side} {zone} consolidation",
        "{size} consolidation in the {side} {zone}",
        "a:{size} airspace consolidation in the {side} {zone}",
        "{size} lobar consolidation of the {side} {zone}",
    ),
    "haze": (
        "{size} pulmonary edema",
        "{size} interstitial edema",
        "{size} perihilar edema",
        "{size} pulmonary vascular congestion",
        "{size} bilateral perihilar edema",
        "{size} alveolar edema",
    ),
    "fluid": (
        "a:{size} {side} pleural effusion",
        "a:{size} {side} effusion",
        "a:{size} pleural effusion on the {side}",
        "{size} pleural fluid on the {side}",
    ),
    "patchy": (
        "{side} {zone} pneumonia",
        "{size} pneumonia in the {side} {zone}",
        "{size} {side} {zone} bronchopneumonia",
    ),
    "hazy": (
        "a:{size} hazy opacity in the {side} {zone}",
        "a:{size} {side} {zone} opacity",
        "a:{size} ground-glass opacity in the {side} {zone}",
    ),
    "collapse": (
        "a:{size} {side} pneumothorax",
        "a:{size} {side} apical pneumothorax",
        "a:{size} pneumothorax on the {side}",
    ),
    "nodule": (
        "a:{size} nodule in the {side} {zone}",
        "a:{size} {side} {zone} nodule",
        "a:{size} pulmonary nodule in the {side} {zone}",
    ),
    "mass": (
        "a:{size} mass in the {side} {zone}",
        "a:{size} {side} {zone} mass",
        "a:{size} rounded mass in the {side} {zone}",
    ),
    "thickening": ("{size} {side} {zone} pleural thickening", "{size} pleural thickening along the {side} {zone}"),
    "cap": ("{size} {side} apical pleural thickening", "{size} pleural scarring at the {side} apex"),
    "rib": ("a:{size} {side} {zone} rib fracture", "a:{size} fracture of a {side} {zone} rib"),
    "clavicle": ("a:{size} {side} clavicle fracture", "a:{size} fracture of the {side} clavicle"),
    "wide": ("{size} widening of the mediastinum", "{size} mediastinal widening"),
    "tracheal": ("an:endotracheal tube", "an:ET tube"),
    "gastric": ("an:enteric tube", "a:nasogastric tube", "an:orogastric tube"),
    "venous": ("a:{side} central venous catheter", "a:{side} central line"),
    "drain": ("a:{side} chest tube", "a:{side} pleural drain"),
    "pacer": (
        "a:{side} chest wall pacemaker",
        "a:{side} dual-lead pacemaker",
        "a:{side} pectoral pacemaker with two leads",
    ),
    "wires": ("sternotomy wires", "median sternotomy wires"),
    "leads": ("ECG leads", "monitoring leads"),
}

ZONES = {
    "lung": {
        "upper": ("upper lobe", "upper lung zone", "upper lung"),
        "mid": ("mid lung", "mid lung zone", "midlung"),
        "lower": ("lower lobe", "lung base", "lower lung zone"),
    },
    "thickening": {"upper": ("upper chest wall",), "mid": ("mid chest wall",), "lower": ("lower chest wall",)},
    "rib": {"upper": ("upper",), "mid": ("mid",), "lower": ("lower",)},
}

PRESENT = {
    "": ("There is {ap}.", "{P} is present.", "{P} is seen.", "{P} is noted.", "{P} is identified.", "{P}."),
    "new": ("New {p}.", "There is new {p}.", "{P} is new since the prior study.", "Interval development of {p}."),
    "unchanged": ("{P} is unchanged.", "Stable {p}.", "{P} is similar to prior.", "Unchanged {p}."),
    "improved": ("{P} has improved.", "Interval improvement of {p}.", "{P} has decreased.", "Decreased {p}."),
    "increased": ("{P} has increased.", "Worsening {p}.", "Interval increase in {p}.", "{P} has progressed."),
}
UNSURE = (
    "Possible {p}.",
    "{P} cannot be excluded.",
    "{P} is possible.",
    "Questionable {p}.",
    "Findings may represent {p}.",
    "Cannot exclude {p}.",
    "Suspected {p}, not certain.",
)
DEVICE = (
    "{P} in place.",
    "{P} noted.",
    "There is {ap}.",
    "{P} in standard position.",
    "{P} in unchanged position.",
)

CLAUSES = {
    "heart": (
        "The [heart is {size} enlarged].",
        "The [cardiac silhouette is {size} enlarged].",
        "[Heart size is {size} enlarged].",
    ),
    "fluid": ("[Blunting of the {side} costophrenic {angle}] consistent with pleural effusion.",),
    "wide": ("The [mediastinum is {size} widened].", "The [cardiomediastinal silhouette is {size} widened]."),
    "patchy": (
        "[Patchy opacity in the {side} {zone}] consistent with pneumonia.",
        "[Patchy {side} {zone} opacity] compatible with pneumonia.",
    ),
    "haze": ("[Perihilar vessels are indistinct] in keeping with {size} pulmonary edema.",),
    "tracheal": ("[Endotracheal tube] tip terminates above the carina.", "[ET tube] tip is in good position."),
    "venous": (
        "[{Side} central venous catheter] tip projects over the SVC.",
        "[{Side} central line] ends in the superior vena cava.",
    ),
    "gastric": ("[Enteric tube] courses below the diaphragm.", "[Nasogastric tube] tip is in the stomach."),
    "pacer": ("[{Side} chest wall pacemaker] leads end in the right atrium and right ventricle.",),
}
UNSURE_CLAUSES = {
    "fluid": ("[Blunting of the {side} costophrenic {angle}] may represent pleural effusion.",),
    "patchy": (
        "[Patchy opacity in the {side} {zone}] may represent pneumonia.",
        "[{Side} {zone} opacity], pneumonia cannot be excluded.",
    ),
    "heart": ("[Heart size] may be {size} enlarged.",),
}
ALSO = {"patchy": "Lung Opacity"}
"""Clauses that speak of an opacity make that label positive too."""

ABSENT = {
    "Pneumothorax": ("No pneumothorax.", "There is no pneumothorax.", "No evidence of pneumothorax."),
    "Pleural Effusion": (
        "No pleural effusion.",
        "There is no pleural effusion.",
        "Costophrenic angles are sharp without effusion.",
    ),
    "Consolidation": ("No focal consolidation.", "There is no focal consolidation.", "No airspace consolidation."),
    "Edema": ("No pulmonary edema.", "There is no evidence of pulmonary edema.", "No pulmonary vascular congestion."),
    "Cardiomegaly": (
        "Heart size is normal.",
        "The heart is normal in size.",
        "The cardiac silhouette is not enlarged.",
        "No cardiomegaly.",
    ),
    "Enlarged Cardiomediastinum": ("The mediastinal contours are normal.", "The mediastinum is not widened."),
    "Fracture": ("No acute fracture.", "No displaced rib fracture."),
    "Lung Lesion": ("No suspicious nodule or mass.", "No pulmonary nodule."),
    "Atelectasis": ("No atelectasis.", "No evidence of atelectasis."),
    "Lung Opacity": ("No focal lung opacity.", "No parenchymal opacity."),
    "Pleural Other": ("No pleural thickening.",),
    "Support Devices": ("No support devices.", "No lines or tubes."),
    "Pneumonia": ("No evidence of pneumonia.", "No pneumonia."),
}
ABSENT_PAIRS = (
    (
        ("Pneumothorax", "Pleural Effusion"),
        ("No pneumothorax or pleural effusion.", "There is no pleural effusion or pneumothorax."),
    ),
    (("Consolidation", "Pleural Effusion"), ("No focal consolidation or pleural effusion.",)),
    (
        ("Consolidation", "Pleural Effusion", "Pneumothorax"),
        ("No focal consolidation, pleural effusion, or pneumothorax.",),
    ),
    (
        ("Cardiomegaly", "Enlarged Cardiomediastinum"),
        ("The cardiomediastinal silhouette is normal.", "Heart size and mediastinal contours are normal."),
    ),
    (("Edema", "Consolidation"), ("No pulmonary edema or consolidation.",)),
)
CLEAR = ("The lungs are clear.", "Lungs are well expanded and clear.", "Both lungs are clear.")
NORMAL = (
    "No acute cardiopulmonary process.",
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "Unremarkable chest radiograph.",
    "No acute disease in the chest.",
)
FILLERS = (
    "The trachea is midline.",
    "Visualized upper abdomen is unremarkable.",
    "Osseous structures are intact.",
    "The hila are unremarkable.",
    "Degenerative changes of the thoracic spine.",
    "Lung volumes are normal.",
)
