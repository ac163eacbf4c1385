"""Findings and support devices on the frontal view: each draws itself and returns its exact mask.

Every function takes the scene and the finding and returns a bool mask (size, size). They are called in the order of
`DRAW`, so that fluid covers what lies in it.
"""

import numpy as np

from gloria_core.phantom.canvas import SIGN, TABLE_ROWS, Array, Scene, clip01, polyline
from gloria_core.phantom.disease import Finding
from gloria_core.phantom.frontal import clavicle_line, rib_offset, wall_curve


def half_width(scene: Scene, y: float) -> float:
    """Distance from the midline to the inner chest wall at height y."""
    return float(np.interp(y, TABLE_ROWS, wall_curve(scene.patient)))


def spot(scene: Scene, finding: Finding, side: str, inner: float, outer: float) -> tuple[float, float]:
    """A place in the finding's zone; `inner`..`outer` is its way from the hilum (0) to the wall (1)."""
    rng = np.random.default_rng([finding.form, side == "left"])
    y = scene.zone_height(finding.zone or "mid") + rng.uniform(-0.06, 0.06)
    wall = half_width(scene, y)
    hilum = 0.17 if finding.zone != "upper" else 0.12
    return SIGN[side] * (hilum + (wall - hilum) * rng.uniform(inner, outer)), y


def doubt(finding: Finding) -> float:
    """An uncertain finding is drawn faintly."""
    return 0.45 if finding.uncertain else 1.0


def mottle(scene: Scene, finding: Finding, spacing: float, sigma: float) -> Array:
    """A smooth random field around 0 that stays the same for the same finding."""
    rng = np.random.default_rng([finding.form, 7])
    n = int((1.8 / spacing) ** 2)
    return scene.blobs(rng.uniform(-0.9, 0.9, (n, 2)), sigma, rng.normal(0, 0.55, n))


def consolidation(scene: Scene, finding: Finding) -> Array:
    """Consolidation: one dense homogeneous area, sharp along a fissure, with air bronchograms."""
    side, sign, rng = finding.side, SIGN[finding.side], np.random.default_rng(finding.form)
    x, y = spot(scene, finding, side, 0.30, 0.55)
    reach = 0.16 + 0.13 * finding.severity
    edge = scene.disc(x, y, reach * 1.3, reach * 1.1) + 0.75 * mottle(scene, finding, 0.13, 0.065)
    # the fissure: lower border of the upper zone, upper border of the middle and lower zones; the rest fades out
    along = sign * (scene.x - x) / reach
    sag = (0.10 * rng.uniform(-0.5, 1.0) * along + 0.07 * rng.uniform(-1.0, 1.0) * along**2) * reach
    cut = scene.y - sag - (y + (0.50 if finding.zone == "upper" else -0.45) * reach)
    plane = scene.edge(-cut if finding.zone == "upper" else cut, 0.022)
    shape = clip01(edge * 1.5 + 0.12) * plane * scene.lung[side]
    amount = shape * np.float32((0.55 + 0.38 * finding.severity) * doubt(finding))
    amount *= 1 - np.minimum(_bronchogram(scene, rng, np.array([x, y]), sign, reach), 0.45) * shape
    scene.fill(amount)
    return shape > 0.40


def _bronchogram(scene: Scene, rng: np.random.Generator, goal: Array, sign: float, reach: float) -> Array:
    """Air-filled bronchi that branch from the hilum into a consolidation around `goal`."""
    hilum = np.array([sign * 0.15, -0.05])
    away = goal - hilum
    away = away / max(np.hypot(*away), 1e-6)
    fork = goal - 0.45 * reach * away
    air = scene.line([hilum, (hilum + fork) / 2 + rng.normal(0, 0.02, 2), fork], 0.0085, 0.30)
    for bend in np.array([-0.75, -0.2, 0.5]) + rng.normal(0, 0.18, 3):
        turn = np.array([[np.cos(bend), -np.sin(bend)], [np.sin(bend), np.cos(bend)]])
        tip = fork + turn @ away * reach * rng.uniform(0.6, 1.0)
        middle = (fork + tip) / 2 + rng.normal(0, 0.018, 2)
        air += scene.line([fork, middle, tip], 0.0062, 0.26)
    return air


def pneumonia(scene: Scene, finding: Finding) -> Array:
    """Pneumonia: several ill-defined fluffy patches that run into each other."""
    total = np.zeros_like(scene.air)
    for side in finding.sides:
        rng = np.random.default_rng([finding.form, 3, side == "left"])
        x, y = spot(scene, finding, side, 0.40, 0.62)
        n = 7 + int(6 * finding.severity)
        points = np.array([x, y]) + rng.normal(0, 1, (n, 2)) * (0.085, 0.10)
        cloud = scene.blobs(points, rng.uniform(0.018, 0.042, n), rng.uniform(0.35, 0.8, n))
        total += cloud * scene.lung[side]
    scene.fill((1 - np.exp(-1.15 * total)) * np.float32((0.42 + 0.5 * finding.severity) * doubt(finding)))
    return total > 0.24


def opacity(scene: Scene, finding: Finding) -> Array:
    """A faint veil without structure (ground glass): vessels stay visible through it."""
    side = finding.side
    x, y = spot(scene, finding, side, 0.40, 0.60)
    size = 0.16 + 0.07 * finding.severity
    cloud = clip01(scene.disc(x, y, size * 1.1, size * 1.25) + 0.25 * mottle(scene, finding, 0.3, 0.13))
    cloud = np.sqrt(cloud) * scene.lung[side]
    scene.extra += cloud * scene.air * np.float32((0.12 + 0.12 * finding.severity) * doubt(finding))
    return cloud > 0.35


def edema(scene: Scene, finding: Finding) -> Array:
    """Edema: perihilar bat wings, thick blurred vessels, Kerley B lines at the bases."""
    rng = np.random.default_rng(finding.form)
    wings = np.zeros_like(scene.air)
    for side, sign in SIGN.items():
        at = np.array([[0.25, -0.20], [0.30, -0.04], [0.29, 0.10], [0.22, 0.20]]) * (sign, 1)
        at = at + rng.normal(0, 0.02, at.shape)
        wings += scene.blobs(at, 0.10 + 0.035 * finding.severity, 0.62) * scene.lung[side]
    wings = 1 - np.exp(-1.3 * wings)
    texture = 1 + 0.35 * mottle(scene, finding, 0.085, 0.030)
    amount = wings * texture * np.float32((0.20 + 0.42 * finding.severity) * doubt(finding))
    scene.extra += amount * scene.air * np.float32(0.6)
    kerley = np.zeros_like(scene.air)
    for sign in SIGN.values():
        for y in np.arange(0.06, 0.42, 0.036) + rng.normal(0, 0.006, 11)[:10]:
            wall = half_width(scene, y)
            ends = [[sign * (wall - 0.012), y], [sign * (wall - 0.012 - rng.uniform(0.045, 0.085)), y + 0.004]]
            kerley += scene.line(ends, 0.0042, 0.16 * finding.strength)
    scene.extra += kerley * scene.air
    return (wings > 0.36) & (scene.lungs("bilateral") > 0.5)


def plate_atelectasis(scene: Scene, finding: Finding) -> Array:
    """Plate-like atelectasis: one to three thin, nearly horizontal dense bands."""
    mask = np.zeros(scene.air.shape, bool)
    for side in finding.sides:
        sign, rng = SIGN[side], np.random.default_rng([finding.form, 11, side == "left"])
        x, y = spot(scene, finding, side, 0.42, 0.58)
        for k in range(1 + int(2.4 * finding.severity)):
            length, tilt = rng.uniform(0.15, 0.21) + 0.05 * finding.severity, sign * rng.uniform(-0.05, 0.30)
            yk = y + 0.085 * (k - 0.5 * int(2.4 * finding.severity)) + rng.normal(0, 0.008)
            knots = [[x - length, yk - tilt * length], [x, yk - 0.012], [x + length, yk + tilt * length]]
            band = scene.line(knots, 0.0145 + 0.007 * rng.random(), 1.0) * scene.lung[side]
            scene.extra += band * scene.air * np.float32((0.21 + 0.17 * finding.severity) * doubt(finding))
            mask |= band > 0.30
    return mask


def basal_atelectasis(scene: Scene, finding: Finding) -> Array:
    """Basal atelectasis: a raised diaphragm with a crowded, streaky dense stripe above it."""
    total = np.zeros_like(scene.air)
    lifted = np.zeros(scene.air.shape, bool)
    height = 0.10 + 0.08 * finding.severity
    for side in finding.sides:
        rng = np.random.default_rng([finding.form, 13, side == "left"])
        # what the raised diaphragm has taken from the lung belongs to the finding, too
        strip = (scene.base < 0) & (scene.base > -scene.change.raised[side]) & (scene.wall > 0)
        lifted |= strip & (scene.x * SIGN[side] > 0.09)
        near = clip01(1.15 - scene.base / height) * clip01((scene.wall - 0.02) / 0.10)
        streaks = np.zeros_like(near)
        for k in range(4):
            x0, drop = rng.uniform(0.16, 0.42), rng.uniform(0.015, 0.05) + 0.028 * k
            top = scene.dome_height(side) - drop
            reach, tilt = rng.uniform(0.13, 0.24), rng.normal(0.03, 0.05)
            middle = [x0 + reach / 2, top + tilt / 2 + rng.normal(0, 0.008)]
            ends = np.array([[x0, top], middle, [x0 + reach, top + tilt]]) * (SIGN[side], 1)
            streaks += scene.line(ends, rng.uniform(0.008, 0.014), 0.38)
        total += (0.62 * near + streaks * (near > 0.02)) * scene.lung[side]
    scene.fill(np.minimum(total, 1.1) * np.float32((0.40 + 0.42 * finding.severity) * doubt(finding)))
    return (total > 0.22) | lifted


def nodule_or_mass(scene: Scene, finding: Finding) -> Array:
    """Nodule or mass: a round, slightly lobulated shadow with its own border."""
    side, rng = finding.side, np.random.default_rng([finding.form, 19])
    x, y = spot(scene, finding, side, 0.30, 0.72)
    small, large = (0.038, 0.062) if finding.kind == "nodule" else (0.085, 0.140)
    radius = small + (large - small) * finding.severity
    shape = scene.disc(x, y, radius, radius * rng.uniform(0.85, 1.1), rng.uniform(0, 3))
    for a in rng.uniform(0, 2 * np.pi, 3):
        lobe = scene.disc(x + 0.45 * radius * np.cos(a), y + 0.45 * radius * np.sin(a), 0.72 * radius)
        shape = np.maximum(shape, 0.9 * lobe)
    shape = clip01(shape) ** 0.45 * (scene.lungs(side) > 0.02)
    amount = (0.23 + 0.13 * finding.severity + (0.05 if finding.kind == "mass" else 0.0)) * doubt(finding)
    scene.extra += shape * np.float32(amount)
    return shape > 0.35


def cardiomegaly(scene: Scene, finding: Finding) -> Array:
    """The heart of a cardiomegaly: it was drawn large with the anatomy, this only says where it is."""
    return (scene.cardiac > 0) & (scene.base > -0.05)


def wide_mediastinum(scene: Scene, finding: Finding) -> Array:
    """The widened upper mediastinum."""
    return (scene.mediastinum > 0) & (scene.y > -0.72) & (scene.y < 0.02)


def effusion(scene: Scene, finding: Finding) -> Array:
    """Pleural effusion: white below a meniscus that climbs the lateral wall and blunts the costophrenic angle."""
    mask = np.zeros(scene.air.shape, bool)
    for side in finding.sides:
        rng = np.random.default_rng([finding.form, 17, side == "left"])
        volume = finding.severity * (rng.uniform(0.75, 1.1) if finding.side == "bilateral" else 1.0)
        top = scene.dome_height(side)
        level = top + 0.135 - 0.42 * volume**1.25
        climb = 0.13 + 0.16 * volume
        rise = climb * np.exp(-np.maximum(scene.wall, 0) / 0.085)
        rise += 0.25 * climb * np.exp(-np.maximum(np.abs(scene.x) - 0.10, 0) / 0.05)
        wet = scene.edge(scene.y - level + rise, 0.035) * scene.lung[side]
        opaque = (0.75 + 0.2 * finding.severity) * (0.6 if finding.uncertain else 1.0)
        scene.fill(wet * np.float32(opaque))
        scene.extra += wet * np.float32(0.06 * opaque)
        mask |= wet > 0.5
    return mask


def pneumothorax(scene: Scene, finding: Finding) -> Array:
    """Pneumothorax: a thin pleural line with nothing but black, vessel-free air beyond it."""
    side, sign = finding.side, SIGN[finding.side]
    gap = 0.070 + 0.22 * finding.severity**1.3
    y, apex = TABLE_ROWS, scene.patient.apex
    fall = clip01((y - apex) / (0.35 + 0.5 * finding.severity))
    inset = gap * (1 - fall) ** 0.8 + (0.02 * finding.severity) * (fall >= 1)
    roof = apex + gap * 1.15
    lung_edge = wall_curve(scene.patient) - inset
    lung_edge = np.where(y < roof, 0.0, 0.27 + (lung_edge - 0.27) * np.sqrt(clip01((y - roof) / 0.12)))
    outside = scene.edge(sign * scene.x - scene.curve(lung_edge)) * scene.lung[side]
    outside *= scene.profile((-1.2, 0.2 + 0.3 * finding.severity, 0.35 + 0.3 * finding.severity), (1.0, 1.0, 0.0))
    rows = np.linspace(roof, min(0.1 + 0.5 * finding.severity, 0.5), 60)
    line = np.stack([sign * np.interp(rows, y, lung_edge), rows], axis=1)
    scene.vessels *= 1 - outside
    scene.extra -= outside * scene.air * np.float32(0.10 + 0.07 * finding.strength)
    collapsed = scene.lung[side] * (1 - outside)
    scene.extra += collapsed * np.float32(0.015 + 0.06 * finding.severity**1.5)
    scene.extra += scene.line(line[::4], 0.0055, 0.18 + 0.10 * finding.strength) * scene.lung[side]
    return outside > 0.5


def pleural_thickening(scene: Scene, finding: Finding) -> Array:
    """Pleural thickening: a dense rind along the lateral wall of one zone, or a cap over the apex."""
    depth = 0.035 + 0.035 * finding.severity
    if finding.kind == "cap":
        roof = scene.profile((-1.2, 1.2), (-1.2, 1.2)) - scene.patient.apex
        rind = scene.edge(depth * 2.6 - roof - 0.6 * np.maximum(0, 0.05 - scene.wall), 0.02)
    else:
        height = scene.y - scene.zone_height(finding.zone)
        rind = scene.edge(depth * np.exp(-((height / 0.17) ** 4)) - scene.wall, 0.010)
    rind = rind * scene.lung[finding.side]
    scene.fill(rind * np.float32((0.45 + 0.4 * finding.severity) * doubt(finding)))
    return rind > 0.5


def rib_fracture(scene: Scene, finding: Finding) -> Array:
    """A broken rib: the fracture line and callus here, the displaced rib itself in `frontal.ribs`."""
    rng, patient = np.random.default_rng([finding.form, 23]), scene.patient
    t = rng.uniform(0.62, 0.84)
    start = patient.apex + 0.02 + patient.rib_phase * 0.04
    rib = np.round((scene.zone_height(finding.zone) - rib_offset(t) - start) / patient.rib_spacing)
    y = float(start + rib * patient.rib_spacing + rib_offset(t))
    shift, sign = 0.036 + 0.034 * finding.strength, SIGN[finding.side]
    distance = float(t * half_width(scene, y))
    scene.broken_ribs.append((sign, distance, y, shift))
    x = sign * distance
    gap = [[x - 0.008 * sign, y - 0.035], [x + 0.008 * sign, y + 0.045]]
    scene.extra -= scene.line(gap, 0.008, 0.08 + 0.06 * finding.strength)
    scene.extra += scene.blobs(np.array([[x, y + shift / 2]]), 0.030, 0.05 * finding.strength)
    return scene.disc(x + 0.03 * sign, y + shift / 2, 0.10, 0.075) > 0


def clavicle_fracture(scene: Scene, finding: Finding) -> Array:
    """The fracture line of a clavicle, and a displaced piece."""
    sign, x = SIGN[finding.side], 0.36 + 0.1 * (finding.form % 100) / 100
    y = float(clavicle_line(np.float64(x), 0.06 if scene.exposure.projection == "AP" else 0.0))
    line = [[sign * (x - 0.012), y - 0.05], [sign * (x + 0.012), y + 0.05]]
    scene.extra -= scene.line(line, 0.011, 0.13 + 0.06 * finding.strength)
    bit = [[sign * (x + 0.005), y + 0.045], [sign * (x + 0.12), y + 0.02]]
    scene.extra += scene.line(bit, 0.014, 0.12 * (0.5 + finding.strength))
    return scene.disc(sign * (x + 0.045), y + 0.005, 0.105, 0.085) > 0


def wire(scene: Scene, knots: list, width: float, peak: float, *, hollow: float = 0.0) -> Array:
    """Draw a tube or wire and return its mask, a little wider than the wire itself."""
    layer = scene.line(knots, width, peak)
    if hollow:  # two walls and a lumen
        layer = layer - scene.line(knots, width * 0.55, peak * hollow)
    scene.extra += layer
    return scene.line(knots, max(2.2 * width, 1.6 / scene.unit), 1.0) > 0.42


def tracheal_tube(scene: Scene, finding: Finding) -> Array:
    """Endotracheal tube, its tip above the carina."""
    tip = -0.36 + 0.05 * (finding.form % 97) / 97
    return wire(scene, [[0.010, -1.25], [0.004, -0.9], [-0.004, -0.62], [0.0, tip]], 0.020, 0.24, hollow=0.55)


def gastric_tube(scene: Scene, finding: Finding) -> Array:
    """Enteric tube through the mediastinum into the stomach."""
    low = scene.dome_height("left")
    oesophagus = [[-0.015, -1.25], [-0.02, -0.7], [-0.005, -0.2], [0.02, 0.25]]
    return wire(scene, [*oesophagus, [0.07, low + 0.02], [0.20, low + 0.13], [0.34, low + 0.12]], 0.0095, 0.24)


def venous_catheter(scene: Scene, finding: Finding) -> Array:
    """Central venous catheter from the neck or under the clavicle to the superior vena cava."""
    sign, tip = SIGN[finding.side], 0.02 + 0.10 * ((finding.form >> 8) % 97) / 97
    jugular, subclavian = [[0.26, -1.2], [0.19, -0.85], [0.13, -0.62]], [[0.72, -0.50], [0.46, -0.60], [0.20, -0.57]]
    start = [[sign * x, y] for x, y in (jugular if finding.form % 2 else subclavian)]
    cross = [[-0.02, -0.48]] if finding.side == "left" else []
    return wire(scene, [*start, *cross, [-0.105, -0.36], [-0.115, -0.15], [-0.112, tip]], 0.0085, 0.25)


def chest_tube(scene: Scene, finding: Finding) -> Array:
    """Chest tube through the lateral wall towards the apex."""
    knots = [[1.05, 0.34], [0.76, 0.22], [0.60, 0.05], [0.52, -0.25], [0.40, -0.52]]
    return wire(scene, [[SIGN[finding.side] * x, y] for x, y in knots], 0.015, 0.24, hollow=0.45)


def pacemaker(scene: Scene, finding: Finding) -> Array:
    """Pacemaker: a box below the clavicle and two leads to the right atrium and ventricle."""
    sign = SIGN[finding.side]
    x, y = sign * 0.55, -0.43
    box = np.maximum(scene.disc(x, y, 0.125, 0.10), scene.disc(x, y + 0.015, 0.112, 0.10))
    box = scene.edge(box * 0.06, 0.004)
    inner = scene.edge(scene.disc(x, y + 0.025, 0.085, 0.06) * 0.04, 0.006)
    scene.extra += 0.52 * box + 0.16 * inner
    top = [[x - sign * 0.04, y - 0.11], [sign * 0.38, -0.62], [sign * 0.17, -0.57]]
    cross = [[-0.01, -0.50]] if finding.side == "left" else []
    vena = [*top, *cross, [-0.10, -0.36], [-0.115, -0.10]]
    mask = (box > 0.5) | wire(scene, [*vena, [-0.13, 0.08], [-0.09, 0.17], [-0.05, 0.10]], 0.0065, 0.22)
    return mask | wire(scene, [*vena, [-0.08, 0.20], [0.08, 0.33], [0.25, 0.36]], 0.0065, 0.22)


def sternotomy_wires(scene: Scene, finding: Finding) -> Array:
    """Sternotomy wires: a column of small loops in the midline."""
    mask = np.zeros(scene.air.shape, bool)
    rng = np.random.default_rng(finding.form)
    for y in np.linspace(-0.45, 0.25, 6):
        tilt = rng.normal(0, 0.008)
        loop = [(-0.045, y), (0.0, y - 0.020 + tilt), (0.045, y), (0.0, y + 0.020 - tilt), (-0.045, y)]
        points, lengths = polyline(loop)
        scene.extra += scene.strokes(points, lengths * 0.26, 0.0065)
        mask |= scene.disc(0, y, 0.065, 0.045) > 0
    return mask


def ecg_leads(scene: Scene, finding: Finding) -> Array:
    """ECG electrodes and their cables, lying on the skin."""
    rng = np.random.default_rng(finding.form)
    mask = np.zeros(scene.air.shape, bool)
    ends = np.array([[-0.58, -0.55], [0.60, -0.52], [-0.56, 0.46], [0.58, 0.40], [0.20, 0.10]])
    ends = ends + rng.normal(0, 0.04, (5, 2))
    for k in np.flatnonzero(rng.random(5) < 0.85):
        x, y = ends[k]
        scene.extra += 0.30 * scene.edge(scene.disc(x, y, 0.028) * 0.014, 0.004)
        mask |= scene.disc(x, y, 0.045) > 0
        far = [x * 1.2 + rng.normal(0, 0.1), 1.2]
        knots = [[x, y], [x * 1.12, y + 0.16], [(x + far[0]) / 2 + rng.normal(0, 0.06), 0.75], far]
        mask |= wire(scene, knots, 0.0055, 0.20)
    return mask


DRAW = {
    "pneumothorax": pneumothorax, "edema": edema, "opacity": opacity, "pneumonia": pneumonia,
    "consolidation": consolidation, "nodule": nodule_or_mass, "mass": nodule_or_mass, "plate": plate_atelectasis,
    "basal": basal_atelectasis, "thickening": pleural_thickening, "cap": pleural_thickening, "effusion": effusion,
    "rib": rib_fracture, "clavicle": clavicle_fracture, "cardiomegaly": cardiomegaly, "wide": wide_mediastinum,
    "tracheal": tracheal_tube, "gastric": gastric_tube, "venous": venous_catheter, "chest_tube": chest_tube,
    "pacemaker": pacemaker, "wires": sternotomy_wires, "leads": ecg_leads,
}  # fmt: skip
