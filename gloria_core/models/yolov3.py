"""The detector of MGCA's table: a YOLOv3 neck on a ResNet (Wang et al. 2022, https://arxiv.org/abs/2210.06044).

Written from the description of the protocol, after Redmon and Farhadi 2018 (https://arxiv.org/abs/1804.02767). Three
scales (stride 32, 16, 8), three anchors a cell, objectness apart from the classes. As released: trunk frozen but its
BatchNorm in training mode, means over the whole grid in the loss, objectness as score, confidence at least 0.5.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation, batched_nms

from gloria_core.models.detection import Detector, Target

# Width and height in pixels of an image of 416, at stride 32, 16 and 8; they are scaled to the images' side.
ANCHORS = (((116, 90), (156, 198), (373, 326)), ((30, 61), (62, 45), (59, 119)), ((10, 13), (16, 30), (33, 23)))
ANCHOR_SIDE = 416
NECK = (512, 256, 128)
# An anchor that overlaps a box more than this, by shape, is not taught to be background at the box's cell.
IGNORE_IOU = 0.5
WEIGHT_XY, WEIGHT_WH, WEIGHT_EMPTY = 2.5, 2.5, 0.5


# Convolution, batch normalisation, leaky ReLU: (channels in, channels out, kernel).
_cbl = partial(Conv2dNormActivation, activation_layer=partial(nn.LeakyReLU, 0.1))


class YoloNeck(nn.Module):
    """Six CBL (1x1 and 3x3 in turn) and a 1x1 convolution a scale; the fifth CBL branches to the next finer scale.

    Shape: C3, C4, C5 -> three maps (B, 3 * (5 + K), h, w) at stride 32, 16, 8
    """

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.blocks, self.outputs, self.branches = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        extra = 0
        for scale, (stage, narrow) in enumerate(zip(reversed(widths), NECK, strict=True)):
            wide, layers, before = 2 * narrow, [], stage + extra
            for _ in range(3):
                layers += [_cbl(before, narrow, 1), _cbl(narrow, wide, 3)]
                before = wide
            self.blocks.append(nn.Sequential(*layers))
            self.outputs.append(nn.Conv2d(wide, 3 * (5 + classes), 1))
            if scale < 2:
                extra = narrow // 2
                self.branches.append(_cbl(narrow, extra, 1))

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        maps, x = [], stages[2]
        for scale, block in enumerate(self.blocks):
            if scale:
                x = F.interpolate(self.branches[scale - 1](x), scale_factor=2.0, mode="nearest")
                x = torch.cat([x, stages[2 - scale]], dim=1)
            x = block[:5](x)
            maps.append(self.outputs[scale](block[5](x)))
        return maps


class YoloDetector(Detector):
    """`detector="yolov3_mgca"`; see the module. `score_threshold` is the published one, `width` has no use here.

    The published images are 224 x 224, the trunk is a ResNet-50 with `batch_norm="train"`; any ResNet and any multiple
    of 32 is taken.
    """

    score_threshold = 0.5

    def build(self, classes: int, width: int) -> None:
        self.neck = YoloNeck(self.widths, classes)
        self.register_buffer("anchors", torch.tensor(ANCHORS) * self.side / ANCHOR_SIDE)

    def standardise(self, stages: Sequence[Tensor]) -> None:
        """Nothing: the neck begins with batch normalisation, and the published protocol has no other."""

    def losses(self, stages: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        maps = self.neck(stages)
        with torch.autocast(maps[0].device.type, enabled=False):
            terms = [yolo_losses(m.float(), a, targets, self.side) for m, a in zip(maps, self.anchors, strict=True)]
        return {name: sum(term[name] for term in terms) for name in terms[0]}

    def detect(self, stages: Sequence[Tensor]) -> list[Target]:
        maps = self.neck(stages)
        with torch.autocast(maps[0].device.type, enabled=False):
            parts = [decode(m.float(), a, self.side) for m, a in zip(maps, self.anchors, strict=True)]
        boxes, scores, classes = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        detections = []
        for box, score, of_class in zip(boxes, scores, classes.argmax(dim=2), strict=True):
            kept = (score >= self.score_threshold).nonzero()[:, 0]
            kept = kept[nms_plus_one(box[kept], score[kept], of_class[kept])][: self.max_detections]
            detections.append({"boxes": box[kept], "labels": of_class[kept], "scores": score[kept]})
        return detections


def _split(outputs: Tensor) -> Tensor:
    """(B, 3 * (5 + K), h, w) -> (B, 3, h, w, 5 + K): x, y, w, h, objectness, classes; none squashed yet."""
    count, channels, height, width = outputs.shape
    return outputs.view(count, 3, channels // 3, height, width).permute(0, 1, 3, 4, 2)


def shape_iou(sizes: Tensor, anchors: Tensor) -> Tensor:
    """IoU of boxes and anchors laid on one corner, each side one unit longer (the "+1 pixel" of integer boxes).

    Shape: (n, 2), (A, 2) widths and heights in cells -> (n, A)
    """
    sizes, anchors = sizes[:, None] + 1, anchors[None] + 1
    inter = torch.minimum(sizes, anchors).prod(dim=2)
    return inter / (sizes.prod(dim=2) + anchors.prod(dim=2) - inter)


def assign(targets: Sequence[Target], anchors: Tensor, grid: int, side: int, classes: int) -> dict[str, Tensor]:
    """What each cell and anchor of one scale is taught: every box has its best anchor at every scale.

    anchors: (3, 2) pixels. Two boxes with one cell and anchor: the later one gives place and size, the classes of both
    stay. `empty` is cleared, in the box's cell, for every anchor that overlaps it by more than 0.5 and, as published,
    for no other: a best anchor with less overlap is taught the box and, at half the weight, that there is none.
    Shape: mask, empty (B, 3, grid, grid); box (B, 3, grid, grid, 4) x, y, w, h; classes (B, 3, grid, grid, K)
    """
    cells, device, stride = (len(targets), 3, grid, grid), anchors.device, side / grid
    last_axis = {"mask": (), "empty": (), "box": (4,), "classes": (classes,)}
    taught = {name: torch.zeros(*cells, *axis, device=device) for name, axis in last_axis.items()}
    taught["empty"] += 1
    boxes = torch.cat([t["boxes"] for t in targets]).to(device) / stride
    labels = torch.cat([t["labels"] for t in targets]).to(device, torch.int64)
    image = torch.cat([torch.full((len(t["boxes"]),), n, device=device) for n, t in enumerate(targets)])
    centre, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    column, row = centre.long().clamp(0, grid - 1).unbind(dim=1)
    overlap = shape_iou(sizes, anchors / stride)
    best = overlap.argmax(dim=1)
    box, anchor = (overlap > IGNORE_IOU).nonzero(as_tuple=True)
    taught["empty"][image[box], anchor, row[box], column[box]] = 0.0
    taught["classes"][image, best, row, column, labels] = 1.0
    # which of several boxes is written last is not defined for tensors: keep the last by hand
    place = ((image * 3 + best) * grid + row) * grid + column
    order = torch.arange(len(place), device=device)
    last = torch.full((taught["mask"].numel(),), -1, device=device).scatter_reduce(0, place, order, "amax")
    keep = last[place] == order
    where = tuple(index[keep] for index in (image, best, row, column))
    taught["mask"][where] = 1.0
    ratio = (sizes / (anchors / stride)[best]).log()
    taught["box"][where] = torch.cat([centre - torch.stack([column, row], dim=1), ratio], dim=1)[keep]
    return taught


def yolo_losses(outputs: Tensor, anchors: Tensor, targets: Sequence[Target], side: int) -> dict[str, Tensor]:
    """Loss terms of one scale, weighted: means over all cells of the grid, cells without a box counting as 0.

    The classes' term is a mean over the cells with a box and 0 if there is none.
    """
    cells = _split(outputs)
    taught = assign(targets, anchors, cells.shape[2], side, cells.shape[4] - 5)
    mask, empty, box = taught["mask"], taught["empty"], taught["box"]
    entropy = F.binary_cross_entropy_with_logits
    xy = sum((mask * entropy(cells[..., i], box[..., i], reduction="none")).mean() for i in (0, 1))
    wh = sum((mask * (cells[..., i] - box[..., i]) ** 2).mean() for i in (2, 3))
    said = cells[..., 4]
    there = (mask * F.softplus(-said)).mean()
    nothing = (empty * F.softplus(said)).mean()
    chosen = mask > 0
    of_class = entropy(cells[..., 5:][chosen], taught["classes"][chosen]) if chosen.any() else outputs.sum() * 0
    return {
        "xy": WEIGHT_XY * xy,
        "wh": WEIGHT_WH * wh,
        "objectness": there + WEIGHT_EMPTY * nothing,
        "classification": of_class,
    }


def decode(outputs: Tensor, anchors: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B, n, 4) x1, y1, x2, y2 in pixels, objectness (B, n), class probabilities (B, n, K); n = 3 * h * w."""
    cells = _split(outputs)
    grid = cells.shape[2]
    steps = torch.arange(grid, device=outputs.device)
    corner = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)
    centre = (cells[..., :2].sigmoid() + corner) * (side / grid)
    half = cells[..., 2:4].exp() * anchors[:, None, None] / 2
    boxes = torch.cat([centre - half, centre + half], dim=-1)
    probabilities = cells[..., 4:].sigmoid().flatten(1, 3)
    return boxes.flatten(1, 3), probabilities[..., 0], probabilities[..., 1:]


def nms_plus_one(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float = 0.5) -> Tensor:
    """Greedy suppression within a class: kept rows by falling score. Sides are x2 - x1 + 1 (whole pixels)."""
    longer = boxes + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    # torchvision parts the classes by an offset that takes coordinates for positive
    return batched_nms(longer - longer.min() if len(longer) else longer, scores, labels, iou)
