"""Object detectors on a pretrained trunk: what all share, and torchvision's RetinaNet and Faster R-CNN.

RetinaNet: Lin et al. 2017, https://arxiv.org/abs/1708.02002. Faster R-CNN: Ren et al. 2015,
https://arxiv.org/abs/1506.01497. Both have a feature pyramid: Lin et al. 2017, https://arxiv.org/abs/1612.03144. The
trunk is copied, so that the pretrained model stays as it was; its stages C3, C4, C5 have stride 8, 16, 32.

`stages` (the trunk) and `losses` or `detect` (everything behind it) are separate, because the stages of a frozen trunk
can be computed once. Radiographs are small here, so anchors are sized by the image and not by COCO's 800 pixels. Stages
are standardised by fixed statistics of the training images (`standardise`), as a linear probe does with features: in an
untrained trunk what is common to all images is far larger than what differs between them, and without it the
comparison would be one of scales. Group normalisation (Wu and He 2018) stands in pyramid and heads.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import (
    FeaturePyramidNetwork,
    MultiScaleRoIAlign,
    batched_nms,
    box_iou,
    clip_boxes_to_image,
    sigmoid_focal_loss,
)

from gloria_core.models.image_encoder import ImageEncoder

BatchNorm = Literal["eval", "train"]
# Of one image: `boxes` (n, 4) x1, y1, x2, y2 in pixels, `labels` (n,) classes from 0; of a detection also `scores`.
Target = dict[str, Tensor]

# Names of the three stages in torchvision's detectors.
LEVELS = ("0", "1", "2")
# The sides of the images must be a multiple of this, so that every stage's stride is exact.
STRIDE = 32
RATIOS = (0.5, 1.0, 2.0)
# Side of the smallest anchor at stride 8, 16, 32 as a share of the image; each comes in three sizes a third octave
# apart. 8 to 51 pixels in an image of 96, 19 to 119 in one of 224.
ANCHOR_SHARES = (1 / 12, 1 / 6, 1 / 3)


class Detector(nn.Module):
    """What all detectors share: the trunk, how it is frozen, and the promise of `losses` and `detect`.

    encoder: an ImageEncoder with maps at strides 8, 16 and 32: a ResNet, DenseNet or EfficientNet.
    side: height and width of the images in pixels, a multiple of 32. width: channels of the feature pyramid.
    frozen: no gradient reaches the trunk. batch_norm: "eval" keeps the stored statistics of the trunk; "train" uses
        the batch's and moves the stored ones, which the released code of MGCA does even with a frozen trunk.
    Raises ValueError for another encoder and for a side or width that does not fit.
    """

    score_threshold: float = 0.01
    max_detections: int = 100

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        classes: int,
        side: int,
        width: int = 64,
        frozen: bool = True,
        batch_norm: BatchNorm = "eval",
    ) -> None:
        super().__init__()
        self.widths = encoder.pyramid_widths[2:]
        if side % STRIDE or side < STRIDE:
            raise ValueError(f"the images' side is {side}; it must be a multiple of {STRIDE}: pad or resize them")
        self.side, self.frozen, self.batch_norm = side, frozen, batch_norm
        self.options = {"classes": classes, "side": side, "width": width}
        self.encoder_options = {"name": encoder.name, "in_channels": encoder.in_channels}
        self.trunk = copy.deepcopy(encoder.trunk).requires_grad_(not frozen)
        self.trunk.prune_intermediate_layers()  # EfficientNet's last convolution stands behind its last map
        for number, channels in enumerate(self.widths):
            self.register_buffer(f"shift_{number}", torch.zeros(1, channels, 1, 1))
            self.register_buffer(f"scale_{number}", torch.ones(1, channels, 1, 1))
        self.build(classes, width)

    def build(self, classes: int, width: int) -> None:
        """Make what stands behind the trunk."""
        raise NotImplementedError

    @property
    def stages_are_fixed(self) -> bool:
        """Whether an image's stages stay the same during training, and may be computed once."""
        return self.frozen and self.batch_norm == "eval"

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        self.trunk.train(mode and self.batch_norm == "train")
        return self

    def stages(self, pixels: Tensor) -> list[Tensor]:
        """C3, C4, C5. Shape: (B, C, side, side) -> (B, C_i, side / 8, ...), / 16, / 32."""
        if pixels.shape[-2:] != (self.side, self.side):
            raise ValueError(f"this detector was made for images of {self.side} pixels, got {tuple(pixels.shape)}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            return self.trunk.forward_intermediates(pixels, intermediates_only=True)[2:]

    def standardise(self, stages: Sequence[Tensor]) -> None:
        """Fix mean and deviation of each channel at those of these stages; a constant channel keeps its scale."""
        for number, stage in enumerate(stages):
            deviation, mean = torch.std_mean(stage.detach().float(), dim=(0, 2, 3), correction=0, keepdim=True)
            getattr(self, f"shift_{number}").copy_(mean)
            getattr(self, f"scale_{number}").copy_(torch.where(deviation > 1e-6, deviation, 1.0))

    def standardised(self, stages: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        """By the names that the pyramid uses."""
        pairs = [(getattr(self, f"shift_{n}"), getattr(self, f"scale_{n}")) for n in range(len(stages))]
        scaled = [(stage.float() - shift) / scale for stage, (shift, scale) in zip(stages, pairs, strict=True)]
        return OrderedDict(zip(LEVELS, scaled, strict=True))

    def losses(self, stages: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Loss terms of a batch, to be summed; images without boxes count as background."""
        raise NotImplementedError

    def detect(self, stages: Sequence[Tensor]) -> list[Target]:
        """Detections of each image by falling score, at most `max_detections`, none below `score_threshold`."""
        raise NotImplementedError

    def image_list(self, count: int) -> ImageList:
        """What torchvision's parts want to know of the images: their sizes."""
        return ImageList(torch.empty(count, 0, self.side, self.side), [(self.side, self.side)] * count)


class RetinaDetector(Detector):
    """RetinaNet: pyramid of `width` channels, four convolutions a head, focal loss and L1."""

    def build(self, classes: int, width: int) -> None:
        anchors, norm = anchor_generator(self.side), _group_norm(width)
        head = RetinaNetHead(width, anchors.num_anchors_per_location()[0], classes, norm_layer=norm)
        self.net = RetinaNet(feature_pyramid(self.widths, width), classes, anchor_generator=anchors, head=head)

    def _outputs(self, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, A, K), box changes (B, A, 4) and anchors (A, 4), float32, all levels one after another."""
        levels = list(self.net.backbone(self.standardised(stages)).values())
        predicted = self.net.head(levels)
        anchors = self.net.anchor_generator(self.image_list(1), [level.float() for level in levels])[0]
        return predicted["cls_logits"].float(), predicted["bbox_regression"].float(), anchors

    def losses(self, stages: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        logits, changes, anchors = self._outputs(stages)
        with torch.autocast(logits.device.type, enabled=False):
            return retina_losses(logits, changes, anchors, targets, self.net)

    def detect(self, stages: Sequence[Tensor]) -> list[Target]:
        """The best (anchor, class) pairs of each image, then non-maximum suppression at IoU 0.5 within a class."""
        logits, changes, anchors = self._outputs(stages)
        classes = logits.shape[2]
        scores, places = logits.sigmoid().flatten(1).topk(min(4 * self.max_detections, logits[0].numel()), dim=1)
        detections = []
        for score, place, change in zip(scores, places, changes, strict=True):
            score = score[score >= self.score_threshold]
            place, label = place[: len(score)] // classes, place[: len(score)] % classes
            boxes = self.net.box_coder.decode_single(change[place], anchors[place])
            boxes = clip_boxes_to_image(boxes, (self.side, self.side))
            kept = batched_nms(boxes, score, label, self.net.nms_thresh)[: self.max_detections]
            detections.append({"boxes": boxes[kept], "labels": label[kept], "scores": score[kept]})
        return detections


def retina_losses(
    logits: Tensor, changes: Tensor, anchors: Tensor, targets: Sequence[Target], net: RetinaNet
) -> dict[str, Tensor]:
    """torchvision's `RetinaNet.compute_loss` for a batch at once: same numbers, without its loop over images.

    Shape: logits (B, A, K), changes (B, A, 4), anchors (A, 4)
    """
    count = len(logits)
    matched = torch.full(logits.shape[:2], net.proposal_matcher.BELOW_LOW_THRESHOLD, device=logits.device)
    first, n_boxes = [], 0
    for number, target in enumerate(targets):
        if len(target["boxes"]):
            matched[number] = net.proposal_matcher(box_iou(target["boxes"], anchors))
        first.append(n_boxes)
        n_boxes += len(target["boxes"])
    inside = matched >= 0
    image, place = inside.nonzero(as_tuple=True)
    per_image = inside.sum(dim=1).clamp(min=1)
    box = matched[image, place] + torch.tensor(first, device=logits.device)[image]
    wanted = torch.zeros_like(logits)
    wanted[image, place, torch.cat([t["labels"] for t in targets])[box]] = 1.0
    asked = (matched != net.proposal_matcher.BETWEEN_THRESHOLDS)[..., None]
    focal = (sigmoid_focal_loss(logits, wanted) * asked).sum(dim=(1, 2)) / per_image
    goal = net.box_coder.encode_single(torch.cat([t["boxes"] for t in targets])[box], anchors[place])
    away = (changes[image, place] - goal).abs().sum(dim=1) / per_image[image]
    return {"classification": focal.mean(), "boxes": away.sum() / count}


def feature_pyramid(widths: Sequence[int], width: int) -> FeaturePyramidNetwork:
    """Pyramid of `width` channels on stages of the given `widths`, group-normalised."""
    pyramid = FeaturePyramidNetwork(list(widths), width, norm_layer=_group_norm(width))
    pyramid.out_channels = width
    return pyramid


def _group_norm(width: int) -> partial:
    if width % 8:
        raise ValueError(f"width is {width}; it must be a multiple of 8 (groups of the normalisation)")
    return partial(nn.GroupNorm, max(8, width // 8))


def anchor_generator(side: int) -> AnchorGenerator:
    """Three sizes times three shapes at each of the three strides, see `ANCHOR_SHARES`."""
    sizes = tuple(tuple(side * share * 2 ** (third / 3) for third in range(3)) for share in ANCHOR_SHARES)
    return AnchorGenerator(sizes, (RATIOS,) * len(sizes))


class FasterDetector(Detector):
    """Faster R-CNN: pyramid, region proposals, two fully connected layers on 7 x 7 pooled regions.

    Numbers of proposals and samples are a quarter of torchvision's, which are made for images of 800 pixels.
    """

    def build(self, classes: int, width: int) -> None:
        pool = MultiScaleRoIAlign(list(LEVELS), 7, 2, canonical_scale=self.side // 2)
        self.net = FasterRCNN(
            feature_pyramid(self.widths, width),
            rpn_anchor_generator=anchor_generator(self.side),
            rpn_pre_nms_top_n_train=500,
            rpn_pre_nms_top_n_test=250,
            rpn_post_nms_top_n_train=250,
            rpn_post_nms_top_n_test=100,
            rpn_batch_size_per_image=64,
            box_roi_pool=pool,
            box_head=TwoMLPHead(width * 49, 4 * width),
            box_predictor=FastRCNNPredictor(4 * width, classes + 1),
            box_score_thresh=self.score_threshold,
            box_detections_per_img=self.max_detections,
            box_batch_size_per_image=128,
        )

    def _levels(self, stages: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        levels = self.net.backbone(self.standardised(stages))
        return OrderedDict((name, level.float()) for name, level in levels.items())

    def losses(self, stages: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        levels, images = self._levels(stages), self.image_list(len(targets))
        with torch.autocast(stages[0].device.type, enabled=False):
            # class 0 is torchvision's background
            targets = [{"boxes": t["boxes"], "labels": t["labels"] + 1} for t in targets]
            proposals, of_proposals = self.net.rpn(images, levels, targets)
            _, of_boxes = self.net.roi_heads(levels, proposals, images.image_sizes, targets)
        return of_proposals | of_boxes

    def detect(self, stages: Sequence[Tensor]) -> list[Target]:
        levels, images = self._levels(stages), self.image_list(len(stages[0]))
        with torch.autocast(stages[0].device.type, enabled=False):
            proposals, _ = self.net.rpn(images, levels)
            detections, _ = self.net.roi_heads(levels, proposals, images.image_sizes)
        return [{"boxes": f["boxes"], "labels": f["labels"] - 1, "scores": f["scores"]} for f in detections]
