"""The lateral chest radiograph: sternum on the image's left, spine on its right, both lungs superimposed.

Findings keep the height that they have on the frontal view. Pneumothorax, pleural thickening, fractures, chest tubes
and ECG leads are not drawn from the side.
"""

import numpy as np

from gloria_core.phantom.canvas import AIR, AnatomyChange, Array, Scene, clip01
from gloria_core.phantom.disease import Finding
from gloria_core.phantom.findings import mottle, wire
from gloria_core.phantom.frontal import VESSEL_PEAKS, vessel_tree
from gloria_core.phantom.patient import Exposure, Patient

_FRONT = ((-1.2, -0.86, -0.66, -0.30, 0.10, 0.45, 0.9), (-0.12, -0.14, -0.30, -0.46, -0.57, -0.60, -0.58))
_BACK = ((-1.2, -0.86, -0.62, -0.20, 0.20, 0.60, 1.0), (0.24, 0.28, 0.50, 0.68, 0.70, 0.63, 0.56))


def lung_dome(scene: Scene, side: str, x: Array) -> Array:
    """y of one hemidiaphragm at x: high in front, falling into the posterior sulcus."""
    top = scene.dome_height(side) - 0.02
    t = x + 0.14
    return top + 0.10 * clip01(-t) ** 2 * 2.2 + 0.62 * clip01(t) ** 2.1


def start(size: int, patient: Patient, exposure: Exposure, change: AnatomyChange) -> Scene:
    """Both lungs, the hemidiaphragms and the heart seen from the side."""
    scene = Scene(size, exposure.lateral_pose, patient, exposure, change)
    x, y = scene.x, scene.y
    front, back = scene.profile(*_FRONT, round_off=0.09), scene.profile(*_BACK, round_off=0.09)
    roof = scene.edge(y - patient.apex + 0.03 - 0.9 * clip01(np.abs(x - 0.06) - 0.10), 0.06)
    chest = scene.edge(x - front, 0.01) * scene.edge(back - x, 0.01) * roof
    scene.wall = np.minimum(x - front, back - x)
    thick = 0.62 + 0.38 * (1 - np.exp(-scene.wall.clip(0) * 7))
    domes = {side: lung_dome(scene, side, x) - y for side in ("right", "left")}
    scene.lung = {side: chest * scene.edge(dome, 0.008) for side, dome in domes.items()}
    scene.air = 0.5 * (scene.lung["right"] + scene.lung["left"]) * thick
    scene.base = domes["right"]
    size, lift = patient.heart * change.heart, 0.5 * exposure.inspiration
    grow = size - 1.0
    scene.cardiac = scene.disc(-0.265 + 0.13 * grow, 0.215 - lift - 0.04 * grow, 0.315 * size, 0.25 * size, 0.62)
    wide = change.mediastinum
    arch = 1 - ((np.hypot(x - 0.11, (y + 0.24) * 0.9) - 0.15) / (0.055 * patient.knob + 0.4 * wide)) ** 2
    arch = clip01(arch) * scene.edge(-0.16 - y, 0.10)
    aorta = clip01(1 - ((x - 0.255 + 0.1 * clip01(y)) / (0.05 + 0.3 * wide)) ** 2) * scene.edge(y + 0.2, 0.08)
    front_wide = clip01(scene.disc(-0.16, -0.35, 0.10, 0.22)) * min(wide * 12, 1.0)
    scene.mediastinum = np.maximum(arch, front_wide)
    thick = np.sqrt(clip01(scene.cardiac)) * (0.1 + 0.9 * scene.edge(scene.base + 0.03, 0.05))
    scene.heart = 0.36 * thick + 0.11 * np.sqrt(arch) + 0.06 * aorta + 0.16 * front_wide
    return scene


def tissue(scene: Scene) -> Array:
    """Chest wall, raised arms, abdomen and the air in lungs, trachea and stomach."""
    patient = scene.patient
    x, y = scene.x, scene.y
    pad = 0.05 + 0.05 * patient.girth
    front = scene.profile(_FRONT[0], np.array(_FRONT[1]) - pad - 0.01, round_off=0.11)
    back = scene.profile(_BACK[0], np.array(_BACK[1]) + pad + 0.05, round_off=0.11)
    middle, half = (front + back) / 2, (back - front) / 2
    depth = scene.profile((-1.0, -0.6, 0.2, 0.8), (0.78, 0.72, 0.80, 0.92))
    body = depth * clip01(1 - ((x - middle) / half) ** 2) ** 0.45
    # raised arms: soft tissue over the whole upper edge, thinner than the neck and shoulders in the middle
    arms = clip01(1 - ((x - 0.06) / (0.52 + 0.9 * clip01(-0.72 - y))) ** 2) ** 0.6
    arms *= clip01((-0.50 - y - 0.25 * np.abs(x - 0.05)) * 3.0)
    body = np.maximum(body, 0.60 * arms) + 0.10 * arms
    if patient.breast:
        bump = scene.disc(-0.53 - pad, 0.14, 0.15 * patient.breast + 0.09, 0.30)
        body = np.maximum(body, 0.50 * np.sqrt(clip01(bump))) + 0.04 * clip01(bump)
    body += 0.06 * scene.edge(-scene.base, 0.02) * (body > 0.1)
    tube = x - 0.045 - 0.10 * (y + 0.6)
    trachea = np.sqrt(clip01(1 - (tube / 0.042) ** 2)) * scene.edge(-0.14 - y, 0.03) * scene.edge(y + 1.1, 0.2)
    if patient.gastric:
        top = lung_dome(scene, "left", np.float32(0.02))
        body -= 0.16 * np.sqrt(clip01(scene.disc(0.02, float(top) + 0.10, 0.15 * patient.gastric, 0.055)))
    return body - np.float32(AIR) * scene.air - 0.10 * trachea * (body > 0.2)


def bones(scene: Scene) -> Array:
    """Vertebrae with their discs, oblique ribs, sternum, shoulder blades."""
    x, y = scene.x, scene.y
    off = x - (0.44 - 0.26 * (y - 0.02) ** 2)  # from the middle of the vertebral bodies: the spine is bent
    phase = (y + 0.12 * off) / 0.128 + 0.3 * y
    f = np.abs(phase - np.round(phase))
    body = scene.edge(0.068 + 0.012 * clip01(y) + 0.012 * f - np.abs(off), 0.012)
    layer = body * (0.125 - 0.085 * np.exp(-(((f - 0.5) / 0.10) ** 2)))
    layer += body * 0.05 * np.exp(-(((f - 0.38) / 0.06) ** 2))
    layer += np.exp(-(((off - 0.115) / 0.035) ** 2)) * (0.05 + 0.05 * np.cos(2 * np.pi * phase))
    t = clip01((x + 0.55) / 1.15)
    for shift in (0.0, 0.055):
        level = y - 0.36 * (1 - t) ** 1.5 + shift + 0.10 * t**2
        rib = np.abs(level / 0.165 - np.round(level / 0.165)) * 0.165
        ribs = 0.045 * scene.edge(0.024 - rib, 0.012) * (scene.wall > -0.02)
        layer += ribs * scene.edge(0.62 - y, 0.3) * clip01(t * 2.2)
    front = scene.profile(_FRONT[0], np.array(_FRONT[1]) - 0.022, round_off=0.09)
    sternum = 0.14 * scene.edge(0.019 - np.abs(x - front), 0.006)
    layer += sternum * scene.edge(y + 0.60, 0.03) * scene.edge(0.22 - y, 0.03)
    for x0, bend in ((0.36, 0.02), (0.45, -0.01)):
        layer += scene.line([[x0, -0.95], [x0 + bend, -0.6], [x0 + 0.06, -0.22]], 0.011, 0.06)
    return layer * (0.4 + 0.6 * scene.patient.rib_density)


def vessels(scene: Scene) -> Array:
    """The two vessel trees seen end on: the frontal ones folded about the hilum."""
    wet = scene.change.congestion
    peaks = [0.7 * peak for peak in VESSEL_PEAKS]
    layer = vessel_tree(scene, peaks, lambda _: 1 + 0.4 * wet, lambda points: points * (0.85, 1) + (0.06, 0))
    hila = np.array([[0.04, -0.06], [0.10, -0.01], [0.07, -0.12]])
    return layer + scene.blobs(hila, 0.045, 0.085 * (1 + 0.5 * wet))


def density(scene: Scene) -> Array:
    """Everything that lies in the beam of the lateral view."""
    return tissue(scene) + scene.heart * (1 - 0.6 * scene.solid) + bones(scene) + vessels(scene) + scene.extra


def _spot(scene: Scene, finding: Finding) -> tuple[float, float]:
    rng = np.random.default_rng([finding.form, 31])
    y = scene.zone_height(finding.zone or "mid") + rng.uniform(-0.05, 0.05)
    # the lower lobes lie behind
    depths = {"lower": 0.10 + 0.18 * abs(finding.depth), "mid": -0.22 + 0.15 * finding.depth}
    return 0.06 + depths.get(finding.zone, 0.30 * finding.depth), y


def _fill(scene: Scene, finding: Finding, amount: Array) -> None:
    """Fill one of the two superimposed lungs, or both."""
    scene.fill(amount * np.float32(1.0 if finding.side in ("bilateral", "") else 0.62))


def _cloud(scene: Scene, finding: Finding, n: int, spread: float, sigma: float, gain: float) -> Array:
    rng = np.random.default_rng([finding.form, 37])
    points = np.array(_spot(scene, finding)) + rng.normal(0, spread, (n, 2))
    cloud = scene.blobs(points, sigma * rng.uniform(0.7, 1.4, n), gain)
    return (1 - np.exp(-cloud)) * scene.lungs(finding.side or "bilateral")


def consolidation(scene: Scene, finding: Finding) -> Array:
    """Consolidation, sharp along the oblique fissure."""
    x, y = _spot(scene, finding)
    reach = 0.17 + 0.12 * finding.severity
    shape = clip01(scene.disc(x, y, reach * 1.2, reach) * 2.6) * scene.lungs(finding.side)
    fissure = (scene.x - x) * 0.75 - (scene.y - y) * 0.66 + 0.5 * reach
    shape *= scene.edge(-fissure if finding.zone == "upper" else fissure, 0.01)
    _fill(scene, finding, shape * (0.45 + 0.5 * finding.strength))
    return shape > 0.45


def pneumonia(scene: Scene, finding: Finding) -> Array:
    """Pneumonia: fluffy patches."""
    cloud = _cloud(scene, finding, 9, 0.09, 0.032, 0.9)
    _fill(scene, finding, cloud * (0.45 + 0.5 * finding.strength))
    return cloud > 0.30


def opacity(scene: Scene, finding: Finding) -> Array:
    """A structureless veil."""
    cloud = _cloud(scene, finding, 4, 0.05, 0.13, 0.6)
    scene.extra += cloud * scene.air * np.float32(0.10 + 0.13 * finding.strength)
    return cloud > 0.35


def edema(scene: Scene, finding: Finding) -> Array:
    """Edema: haze around the hila and thick fissures."""
    points = np.array([[0.00, -0.20], [0.17, -0.10], [0.20, 0.08], [0.06, 0.14], [-0.14, -0.02]])
    wings = scene.blobs(points, 0.095 + 0.03 * finding.severity, 0.6) * scene.lungs("bilateral")
    wings = 1 - np.exp(-1.3 * wings)
    texture = 1 + 0.35 * mottle(scene, finding, 0.085, 0.030)
    scene.extra += wings * scene.air * np.float32(0.16 + 0.26 * finding.strength) * texture
    fissure = scene.line([[0.33, -0.38], [0.08, 0.02], [-0.25, 0.40]], 0.006, 0.06 + 0.08 * finding.strength)
    scene.extra += fissure * scene.air
    return wings > 0.36


def plate_atelectasis(scene: Scene, finding: Finding) -> Array:
    """Plate-like atelectasis: bands."""
    x, y = _spot(scene, finding)
    mask = np.zeros(scene.air.shape, bool)
    for k in range(1 + int(2.4 * finding.severity)):
        yk = y + 0.07 * k
        knots = [[x - 0.17, yk + 0.03], [x, yk - 0.01], [x + 0.17, yk - 0.02]]
        band = scene.line(knots, 0.012, 1.0) * scene.lungs(finding.side)
        scene.extra += band * scene.air * np.float32(0.12 + 0.16 * finding.strength)
        mask |= band > 0.3
    return mask


def basal_atelectasis(scene: Scene, finding: Finding) -> Array:
    """Basal volume loss above the posterior diaphragm."""
    above = lung_dome(scene, finding.sides[0], scene.x) - scene.y
    near = clip01(1.1 - above / (0.10 + 0.08 * finding.severity))
    near = near * scene.lungs(finding.side) * scene.edge(scene.x + 0.05, 0.2)
    _fill(scene, finding, near * (0.3 + 0.5 * finding.strength))
    return near > 0.25


def effusion(scene: Scene, finding: Finding) -> Array:
    """Pleural effusion: the posterior sulcus fills first, with a meniscus along the back wall."""
    level = 0.80 - scene.exposure.inspiration - 0.55 * finding.severity**1.1
    rise = (0.12 + 0.10 * finding.severity) * np.exp(-np.maximum(scene.wall, 0) / 0.10)
    wet = scene.edge(scene.y - level + rise, 0.03) * scene.lungs(finding.side)
    if finding.severity < 0.7:
        wet = wet * scene.edge(scene.x - 0.05, 0.15)
    _fill(scene, finding, wet * np.float32(0.6 + 0.4 * finding.strength))
    return wet > 0.5


def nodule_or_mass(scene: Scene, finding: Finding) -> Array:
    """Nodule or mass."""
    x, y = _spot(scene, finding)
    small, large = (0.038, 0.062) if finding.kind == "nodule" else (0.085, 0.140)
    shape = clip01(scene.disc(x, y, small + (large - small) * finding.severity)) ** 0.45
    shape = shape * (scene.lungs(finding.side) > 0.02)
    scene.extra += shape * np.float32(0.14 + 0.12 * finding.strength)
    return shape > 0.35


def cardiomegaly(scene: Scene, finding: Finding) -> Array:
    """The heart."""
    return scene.cardiac > 0


def wide_mediastinum(scene: Scene, finding: Finding) -> Array:
    """The widened upper mediastinum, filling the space behind the sternum."""
    return scene.mediastinum > 0.1


def tracheal_tube(scene: Scene, finding: Finding) -> Array:
    """Endotracheal tube."""
    return wire(scene, [[0.0, -1.2], [0.02, -0.8], [0.065, -0.40]], 0.018, 0.13)


def gastric_tube(scene: Scene, finding: Finding) -> Array:
    """Enteric tube behind the heart."""
    return wire(scene, [[0.05, -1.2], [0.12, -0.6], [0.19, 0.0], [0.13, 0.45], [0.0, 0.66]], 0.0095, 0.20)


def venous_catheter(scene: Scene, finding: Finding) -> Array:
    """Central venous catheter."""
    return wire(scene, [[-0.12, -1.0], [-0.06, -0.6], [-0.03, -0.3], [-0.03, 0.0]], 0.0085, 0.20)


def pacemaker(scene: Scene, finding: Finding) -> Array:
    """Pacemaker box edge-on in the front wall, leads into the heart."""
    box = scene.edge(scene.disc(-0.44, -0.50, 0.045, 0.12, -0.5) * 0.04, 0.004)
    scene.extra += 0.45 * box
    vena = [[-0.36, -0.56], [-0.16, -0.64], [-0.04, -0.45], [-0.02, -0.10]]
    mask = (box > 0.5) | wire(scene, [*vena, [-0.10, 0.10], [-0.18, 0.06]], 0.0075, 0.26)
    return mask | wire(scene, [*vena, [-0.10, 0.25], [-0.38, 0.33]], 0.0075, 0.26)


def sternotomy_wires(scene: Scene, finding: Finding) -> Array:
    """Sternotomy wires along the sternum."""
    mask = np.zeros(scene.air.shape, bool)
    for y in np.linspace(-0.50, 0.18, 6):
        x = float(np.interp(y, (-0.66, -0.30, 0.10, 0.45), (-0.32, -0.48, -0.59, -0.62)))
        mask |= wire(scene, [[x - 0.02, y], [x, y - 0.015], [x + 0.02, y]], 0.007, 0.26)
    return mask


DRAW = {
    "edema": edema, "opacity": opacity, "pneumonia": pneumonia, "consolidation": consolidation,
    "nodule": nodule_or_mass, "mass": nodule_or_mass, "plate": plate_atelectasis, "basal": basal_atelectasis,
    "effusion": effusion, "cardiomegaly": cardiomegaly, "wide": wide_mediastinum, "tracheal": tracheal_tube,
    "gastric": gastric_tube, "venous": venous_catheter, "pacemaker": pacemaker, "wires": sternotomy_wires,
}  # fmt: skip
