"""torchvision's Faster R-CNN with a feature pyramid on a pretrained ResNet trunk.

Ren et al. 2015, https://arxiv.org/abs/1506.01497. Trunk, pyramid and anchors are those of `detectors.RetinaDetector`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from gloria_core.models.detectors import STAGES, BatchNorm, Detector, Target, anchor_generator, feature_pyramid
from gloria_core.models.image_encoder import ImageEncoder


class FasterDetector(Detector):
    """Faster R-CNN: pyramid, region proposals, two fully connected layers on 7 x 7 pooled regions.

    Numbers of proposals and samples are a quarter of torchvision's, which are made for images of 800 pixels.
    """

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
        super().__init__(encoder, side=side, frozen=frozen, batch_norm=batch_norm)
        names = list(STAGES.values())
        pool = MultiScaleRoIAlign(names, 7, 2, canonical_scale=side // 2)
        self.net = FasterRCNN(
            feature_pyramid(self.widths, width),
            rpn_anchor_generator=anchor_generator(side),
            rpn_pre_nms_top_n_train=500,
            rpn_pre_nms_top_n_test=250,
            rpn_post_nms_top_n_train=250,
            rpn_post_nms_top_n_test=100,
            rpn_batch_size_per_image=64,
            box_roi_pool=pool,
            box_head=TwoMLPHead(width * 49, 4 * width),
            box_predictor=FastRCNNPredictor(4 * width, classes + 1),
            box_score_thresh=self.least_score,
            box_detections_per_img=self.most,
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
            found, _ = self.net.roi_heads(levels, proposals, images.image_sizes)
        return [{"boxes": f["boxes"], "labels": f["labels"] - 1, "scores": f["scores"]} for f in found]
