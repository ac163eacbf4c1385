import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gloria_core.models import yolov3 as yolo
from gloria_core.models.detection import FasterDetector, RetinaDetector, retina_losses
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.models.yolov3 import YoloDetector, YoloNeck, assign, decode, nms_plus_one, yolo_losses

DETECTORS = (RetinaDetector, FasterDetector, YoloDetector)
SIDE = 64


def _target(*boxes, labels=None):
    boxes = torch.tensor(np.array(boxes, np.float32).reshape(-1, 4))
    return {"boxes": boxes, "labels": torch.tensor(labels or [0] * len(boxes), dtype=torch.int64)}


TARGETS = [_target([4, 4, 30, 40], [20, 30, 60, 62], labels=[1, 2]), _target(), _target([8, 8, 16, 16])]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    made = ImageEncoder("resnet_tiny")
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return made


@pytest.fixture
def pixels():
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def _make(kind, encoder, **options):
    torch.manual_seed(0)
    return kind(encoder, classes=3, side=SIDE, **options)


@pytest.mark.parametrize("kind", DETECTORS)
def test_the_trunk_is_the_checkpoints(kind, encoder, pixels):
    detector = _make(kind, encoder).eval()
    theirs = encoder.trunk.state_dict()
    ours = detector.trunk.state_dict()
    assert len(ours) > 30
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) and value.data_ptr() != theirs[name].data_ptr()
    stages = detector.stages(pixels)
    assert [tuple(s.shape) for s in stages] == [(3, 32, 8, 8), (3, 64, 4, 4), (3, 128, 2, 2)]
    features = encoder.eval()(pixels)
    torch.testing.assert_close(stages[1].permute(0, 2, 3, 1), features.regions)
    torch.testing.assert_close(stages[2].mean((2, 3)), features.pooled)


@pytest.mark.parametrize("name", ["densenet121", "efficientnet_lite0"])
def test_other_trunks_give_the_maps_of_their_regions(name, pixels):
    for number, stage in enumerate(("layer2", "layer3", "layer4")):
        torch.manual_seed(0)
        other = ImageEncoder(name, region_stage=stage).eval()
        detector = _make(RetinaDetector, other).eval()
        with torch.no_grad():
            found = detector.stages(pixels)
            assert [tuple(s.shape[-2:]) for s in found] == [(8, 8), (4, 4), (2, 2)]
            assert [s.shape[1] for s in found] == detector.widths
            torch.testing.assert_close(found[number].permute(0, 2, 3, 1), other(pixels).regions)
    losses = detector.train().losses(detector.stages(pixels), TARGETS)
    sum(losses.values()).backward()
    assert all(value.grad is not None for value in detector.net.parameters())
    assert {len(found["boxes"]) for found in detector.eval().detect(detector.stages(pixels))} <= set(range(101))


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("frozen", [True, False])
def test_losses_reach_what_may_learn(kind, frozen, encoder, pixels):
    detector = _make(kind, encoder, frozen=frozen, batch_norm="eval").train()
    before = copy.deepcopy(detector.trunk.state_dict())
    losses = detector.losses(detector.stages(pixels), TARGETS)
    assert all(torch.isfinite(term) for term in losses.values()) and len(losses) >= 2
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        if frozen and name.startswith("trunk"):
            assert not parameter.requires_grad and parameter.grad is None
        else:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert all(torch.equal(v, before[n]) for n, v in detector.trunk.state_dict().items())
    assert detector.stages_are_fixed == frozen


@pytest.mark.parametrize("kind", DETECTORS)
def test_batch_norm_in_train_mode_moves_statistics_and_nothing_else(kind, encoder, pixels):
    detector = _make(kind, encoder, frozen=True, batch_norm="train").train()
    before = copy.deepcopy(detector.trunk.state_dict())
    detector.stages(pixels)
    after = detector.trunk.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {n for n in after if n.rsplit(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")}
    assert not detector.stages_are_fixed
    still = copy.deepcopy(after)
    detector.eval().stages(pixels)
    assert all(torch.equal(v, still[n]) for n, v in detector.trunk.state_dict().items())


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_batch_without_any_box(kind, encoder, pixels):
    detector = _make(kind, encoder).train()
    losses = detector.losses(detector.stages(pixels), [_target()] * 3)
    assert all(torch.isfinite(term) for term in losses.values())
    assert float(sum(losses.values()).detach()) > 0


@pytest.mark.parametrize("kind", DETECTORS)
def test_detections_are_ordered_inside_and_above_the_threshold(kind, encoder, pixels):
    detector = _make(kind, encoder).eval()
    detector.score_threshold = 0.001 if kind is not YoloDetector else 0.4
    with torch.no_grad():
        found = detector.detect(detector.stages(pixels))
    assert len(found) == 3 and sum(len(f["boxes"]) for f in found)
    for boxes in found:
        n = len(boxes["scores"])
        assert boxes["boxes"].shape == (n, 4) and boxes["labels"].shape == (n,) and n <= detector.max_detections
        assert (boxes["scores"].diff() <= 0).all() and (boxes["scores"] >= 0.001).all()
        assert boxes["labels"].min() >= 0 and boxes["labels"].max() < 3
        assert (boxes["boxes"][:, 2:] >= boxes["boxes"][:, :2]).all()


@pytest.mark.parametrize(("kind", "steps"), [(RetinaDetector, 120), (FasterDetector, 60), (YoloDetector, 10)])
def test_a_detector_learns_one_batch(kind, steps, encoder, pixels):
    detector = _make(kind, encoder)
    stages = [s.detach() for s in detector.eval().stages(pixels)]
    detector.standardise(stages)
    optimiser = torch.optim.AdamW(
        [p for p in detector.parameters() if p.requires_grad], lr=5e-3 if kind is RetinaDetector else 2e-3
    )
    detector.train()
    losses = []
    for _ in range(steps):
        loss = sum(detector.losses(stages, TARGETS).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.5 * losses[0]
    if kind is YoloDetector:
        return  # ten steps; that boxes come back from what is taught is tested below
    detector.eval()
    with torch.no_grad():
        found = detector.detect(stages)
    assert found[0]["labels"][0].item() in (1, 2) and found[2]["labels"][0].item() == 0


@pytest.mark.parametrize("kind", [RetinaDetector, FasterDetector])
def test_standardised_stages_have_no_common_part(kind, encoder, pixels):
    detector = _make(kind, encoder).eval()
    stages = detector.stages(pixels)
    for plain, same in zip(stages, detector.standardised(stages).values(), strict=True):
        torch.testing.assert_close(plain, same)  # nothing is done before it was asked for
    stages[0][:, 5] = 7.0
    detector.standardise(stages)
    for number, stage in enumerate(detector.standardised(stages).values()):
        deviation, mean = torch.std_mean(stage, dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
        wanted = torch.ones_like(deviation)
        wanted[5] = 0.0 if number == 0 else 1.0
        known = deviation > 1e-3
        torch.testing.assert_close(deviation[known], wanted[known], atol=1e-3, rtol=0)
    assert {f"{n}_{k}" for n in ("shift", "scale") for k in range(3)} <= set(detector.state_dict())


@pytest.mark.parametrize("targets", [TARGETS, [_target()] * 3], ids=["boxes", "none"])
def test_batched_loss_is_torchvisions(encoder, pixels, targets):
    net = _make(RetinaDetector, encoder).train()
    logits, changes, anchors = net._outputs(net.stages(pixels))
    ours = retina_losses(logits, changes, anchors, targets, net.net)
    theirs = net.net.compute_loss(targets, {"cls_logits": logits, "bbox_regression": changes}, [anchors] * 3)
    torch.testing.assert_close(ours["classification"], theirs["classification"])
    torch.testing.assert_close(ours["boxes"], theirs["bbox_regression"])


def test_detections_are_torchvisions(encoder, pixels):
    detector = _make(RetinaDetector, encoder).eval()
    net, count = detector.net, 3
    with torch.no_grad():
        detector.net.head.classification_head.cls_logits.weight.normal_(std=0.02)
        stages = detector.stages(pixels)
        detector.score_threshold, detector.max_detections = 0.02, 10_000
        ours = detector.detect(stages)
        levels = list(net.backbone(detector.standardised(stages)).values())
        found, images = net.head(levels), detector.image_list(count)
        sizes = [9 * level.shape[2] * level.shape[3] for level in levels]
        net.score_thresh, net.topk_candidates, net.detections_per_img = 0.02, 10_000, 10_000
        theirs = net.postprocess_detections(
            {name: list(value.split(sizes, dim=1)) for name, value in found.items()},
            [list(a.split(sizes)) for a in net.anchor_generator(images, levels)],
            images.image_sizes,
        )
    for a, b in zip(ours, theirs, strict=True):
        assert len(a["scores"]) == len(b["scores"]) > 10
        torch.testing.assert_close(a["scores"], b["scores"])
        torch.testing.assert_close(a["boxes"], b["boxes"])
        assert torch.equal(a["labels"], b["labels"])


def test_anchors_grow_with_the_image(encoder):
    sizes = []
    for side in (64, 128):
        torch.manual_seed(0)
        detector = RetinaDetector(encoder, classes=1, side=side)
        sizes.append(np.array(detector.net.anchor_generator.sizes))
    np.testing.assert_allclose(sizes[1], 2 * sizes[0])
    np.testing.assert_allclose(sizes[0][:, 0], [64 / 12, 64 / 6, 64 / 3])


def test_errors(encoder, pixels):
    with pytest.raises(ValueError, match="multiple of 32"):
        RetinaDetector(encoder, classes=1, side=88)
    with pytest.raises(ValueError, match="width"):
        RetinaDetector(encoder, classes=1, side=64, width=30)
    with pytest.raises(ValueError, match=r"'swin_tiny' has no feature maps at strides 2, 4, 8, 16 and 32"):
        RetinaDetector(ImageEncoder("swin_tiny"), classes=1, side=64)
    with pytest.raises(ValueError, match="made for images of 96"):
        RetinaDetector(encoder, classes=1, side=96).stages(pixels)


def test_published_neck_has_the_published_shapes():
    stages = [torch.zeros(1, 512, 28, 28), torch.zeros(1, 1024, 14, 14), torch.zeros(1, 2048, 7, 7)]
    neck = YoloNeck([512, 1024, 2048], classes=1).eval()
    assert [tuple(m.shape) for m in neck(stages)] == [(1, 18, 7, 7), (1, 18, 14, 14), (1, 18, 28, 28)]
    convolutions = [m for m in neck.blocks[1].modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.in_channels for m in convolutions] == [256 + 1024, 256, 512, 256, 512, 256]
    assert [m.kernel_size[0] for m in convolutions] == [1, 3] * 3
    assert [b[0].out_channels for b in neck.branches] == [256, 128]
    assert all(m.negative_slope == 0.1 for m in neck.modules() if isinstance(m, torch.nn.LeakyReLU))


def test_published_defaults(encoder):
    detector = YoloDetector(encoder, classes=1, side=224)
    assert detector.frozen and detector.score_threshold == 0.5
    np.testing.assert_allclose(detector.anchors[0][2], [373 * 224 / 416, 326 * 224 / 416], rtol=1e-6)


def _naive_assign(targets, anchors, grid, side, classes):
    """One loop over images and boxes, as the description reads."""
    shape, stride = (len(targets), 3, grid, grid), side / grid
    taught = {"mask": np.zeros(shape), "empty": np.ones(shape)}
    taught |= {"box": np.zeros((*shape, 4)), "classes": np.zeros((*shape, classes))}
    for b, target in enumerate(targets):
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            gx, gy, gw, gh = (x1 + x2) / 2 / stride, (y1 + y2) / 2 / stride, (x2 - x1) / stride, (y2 - y1) / stride
            i, j, ious = int(gx), int(gy), []
            for aw, ah in (anchors / stride).tolist():
                inter = (min(gw, aw) + 1) * (min(gh, ah) + 1)
                ious.append(inter / ((gw + 1) * (gh + 1) + (aw + 1) * (ah + 1) - inter))
            for n, iou in enumerate(ious):
                if iou > 0.5:
                    taught["empty"][b, n, j, i] = 0
            n = int(np.argmax(ious))
            taught["mask"][b, n, j, i] = 1
            aw, ah = (anchors[n] / stride).tolist()
            taught["box"][b, n, j, i] = gx - i, gy - j, math.log(gw / aw), math.log(gh / ah)
            taught["classes"][b, n, j, i, label] = 1
    return taught


def _many(seed):
    rng, targets = np.random.default_rng(seed), []
    for n in (3, 0, 6, 1):
        corner = rng.uniform(0, 40, (n, 2))
        boxes = np.concatenate([corner, np.minimum(corner + rng.uniform(3, 50, (n, 2)), 64)], axis=1)
        if n == 6:
            boxes[4], boxes[5] = boxes[0], boxes[0] + [0.1, 0, 0.1, 0]  # the same cell, thrice
        targets.append(_target(*boxes, labels=rng.integers(0, 3, n).tolist()))
    return targets


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_targets_and_losses_are_the_naive_ones(scale):
    targets, grid = _many(scale), (2, 4, 8)[scale]
    anchors = torch.tensor(yolo.ANCHORS[scale]) * SIDE / yolo.ANCHOR_SIDE
    naive = _naive_assign(targets, anchors, grid, SIDE, 3)
    taught = assign(targets, anchors, grid, SIDE, 3)
    assert set(taught) == set(naive) and taught["mask"].sum() >= 4
    for name in naive:
        np.testing.assert_allclose(taught[name].numpy(), naive[name], atol=1e-5, err_msg=name)

    outputs = torch.randn(4, 3 * 8, grid, grid, generator=torch.Generator().manual_seed(scale), dtype=torch.float64)
    cells = outputs.view(4, 3, 8, grid, grid).permute(0, 1, 3, 4, 2)
    said, m, n = cells.sigmoid(), torch.tensor(naive["mask"]), torch.tensor(naive["empty"])
    bce, mse = F.binary_cross_entropy, F.mse_loss
    x, y, w, h = torch.tensor(naive["box"]).unbind(-1)
    xy = 2.5 * (bce(said[..., 0] * m, x * m) + bce(said[..., 1] * m, y * m))
    wh = 2.5 * (mse(cells[..., 2] * m, w * m) + mse(cells[..., 3] * m, h * m))
    conf = bce(said[..., 4] * m, m) + 0.5 * bce(said[..., 4] * n, n * 0)
    of_class = bce(said[..., 5:][m == 1], torch.tensor(naive["classes"])[m == 1])
    losses = yolo_losses(outputs, anchors, targets, SIDE)
    expected = {"xy": xy, "wh": wh, "objectness": conf, "classification": of_class}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)


def test_decoding_inverts_the_targets():
    targets, grid, scale = [_target([10, 6, 40, 30], labels=[2])], 8, 2
    anchors = torch.tensor(yolo.ANCHORS[scale]) * SIDE / yolo.ANCHOR_SIDE
    taught = assign(targets, anchors, grid, SIDE, 3)
    outputs = torch.full((1, 3, grid, grid, 8), -20.0)
    place = taught["mask"] > 0
    xy, wh = taught["box"][place].split(2, dim=1)
    outputs[place] = torch.cat([torch.logit(xy.clamp(1e-6)), wh, torch.tensor([[20.0, -20, -20, 20]])], dim=1)
    boxes, said, classes = decode(outputs.permute(0, 1, 4, 2, 3).reshape(1, 24, grid, grid), anchors, SIDE)
    best = said[0].argmax()
    torch.testing.assert_close(boxes[0, best], targets[0]["boxes"][0], atol=1e-3, rtol=1e-4)
    assert classes[0, best].argmax() == 2 and said[0, best] > 0.99 and (said[0] > 0.5).sum() == 1


def test_suppression_counts_whole_pixels():
    # 3 x 3 against 3 x 3 one to the right: plain IoU 6 / 12 = 0.5, with "+1" 12 / 20 = 0.6
    boxes = torch.tensor([[-3.0, 0, 0, 3], [-2.0, 0, 1, 3]])
    scores = torch.tensor([0.8, 0.9])
    assert nms_plus_one(boxes, scores, torch.zeros(2, dtype=torch.int64), 0.55).tolist() == [1]
    assert nms_plus_one(boxes, scores, torch.zeros(2, dtype=torch.int64), 0.65).tolist() == [1, 0]
    assert nms_plus_one(boxes, scores, torch.tensor([0, 1]), 0.55).tolist() == [1, 0]
    assert nms_plus_one(boxes[:0], scores[:0], torch.zeros(0, dtype=torch.int64)).tolist() == []
