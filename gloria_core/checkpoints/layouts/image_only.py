"""Published files without a text encoder: image encoders alone, fine-tuned classifiers, and U-Nets.

Image encoders alone are state dicts under the names of torchvision, timm or transformers (4 and 5), among them PRIOR's
`prior_resnet50.pt`, torchvision's ResNet-50 with one input channel. Network and input channels are read from the
tensors. Classifiers, poolers and tables of counting numbers are left out.

Classifiers are an image encoder and a head on its pooled feature, one linear layer or two with BatchNorm between:
- GLoRIA (Lightning): `model.img_encoder.model.*` with the two embedders of pretraining, which the classifier does not
  use, and `model.classifier.*`; its encoder resizes to 299. From an ImageNet encoder: `model.img_encoder.conv1.*`, and
  no resize.
- gloria-Extended: the same without `model.`, in its own container.
- CXR-CLIP: `image_encoder.{resnet,image_encoder}.*` and `classifier.classification_head.*`. The released code reads a
  Swin's first token here as in pretraining. The pretraining file that its configuration names is not needed.
- MGCA (Lightning, `SSLFineTuner`): `backbone.model.*` with the heads of pretraining, which it does not use, and
  `linear_layer.block_forward.*`; a ResNet resizes to 299.

U-Nets are segmentation-models-pytorch's, as GLoRIA (Lightning, `model.`) and gloria-Extended (no prefix) save them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gloria_core.checkpoints.image_models import ImageClassifier, unet
from gloria_core.checkpoints.layouts import base
from gloria_core.checkpoints.layouts.base import TRUNK, Layout, Stored, Translation
from gloria_core.checkpoints.model import ConfigError
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.models.key_maps import FIRST_FILTERS, Named, is_one_network, network_name, timm_names

ENCODER = "image encoder alone (torchvision, timm, transformers)"
CLASSIFIER = "fine-tuned classifier (GLoRIA, gloria-Extended, CXR-CLIP, MGCA)"
UNET = "U-Net (GLoRIA, gloria-Extended)"

CLASSIFIER_RULES = (
    # the heads of pretraining, which a classifier never calls, and the class weights of a loss
    (r"(model\.)?(img_encoder\.(global|local)_embedder|loss)\.|backbone\.(global|local)_embed\.", None),
    (r"(model\.)?img_encoder\.model\.|backbone\.model\.", TRUNK),
    (r"(model\.)?img_encoder\.", TRUNK),
    (r"image_encoder\.(resnet|image_encoder)\.", TRUNK),
    (r"(model\.)?classifier\.(classification_head\.)?|linear_layer\.block_forward\.", "classifier."),
)
UNET_RULES = ((r"(model\.)?loss\.", None), (r"model\.", ""))
UNET_MARKS = {"encoder.conv1.weight", "decoder.blocks.0.conv1.0.weight", "segmentation_head.0.weight"}


def _is_classifier(names: Mapping[str, Any], stored: Stored) -> bool:
    """A head beside an image encoder, and no text encoder."""
    names = {name.removeprefix("model.") for name in names}
    encoders, heads = ("img_encoder.", "image_encoder.", "backbone.model."), ("classifier.", "linear_layer.")
    has = [any(name.startswith(start) for name in names) for start in (encoders, heads, "text_encoder.")]
    return has == [True, True, False]


def _encoder(tensors: Mapping[str, Tensor], stored: Stored) -> Translation:
    named, ignored = timm_names({name: (name, value) for name, value in tensors.items()})
    # published numbers before speed: no channels-last memory order
    network = partial(
        ImageEncoder, network_name(base.shapes_of(named)), channels_last=False, **_input_channels(named, "")
    )
    return Translation(ENCODER, network, {f"trunk.{name}": pair for name, pair in named.items()}, ignored)


def _classifier(tensors: Mapping[str, Tensor], stored: Stored) -> Translation:
    named, ignored = base.renamed(tensors, CLASSIFIER_RULES)
    head = {theirs: value for theirs, (_, value) in named.items() if theirs.startswith("classifier.")}
    linear = [theirs.rpartition(".")[0] for theirs, value in head.items() if value.ndim == 2]
    norm = [theirs.rpartition(".")[0] for theirs in head if theirs.endswith(".running_mean")]
    if (len(linear), len(norm)) not in ((1, 0), (2, 1)):
        raise ConfigError(f"its head is neither linear nor two layers with BatchNorm: it has {', '.join(head)}")
    classes, hidden = (len(head[f"{layer}.weight"]) for layer in (linear[-1], linear[0]))
    places = {linear[0]: "classifier"}
    if norm:
        places = {linear[0]: "classifier.0", norm[0]: "classifier.1", linear[1]: "classifier.4"}
        if f"{linear[0]}.bias" not in head:  # before a BatchNorm none is needed
            named[f"{linear[0]}.bias"] = ("(zeros, for a bias that the head lacks)", torch.zeros(hidden))
    name = base.image_encoder_name(named)
    resizes = not name.startswith("vit") and any(
        theirs.removeprefix("model.").startswith(("img_encoder.model.", "backbone.model.")) for theirs in tensors
    )
    encoder = partial(
        ImageEncoder,
        name,
        resize_to=299 if resizes else None,
        pooling="first_token" if name == "swin_tiny" else "default",
        channels_last=False,
        **_input_channels(named, TRUNK),
    )
    ours = {}
    for theirs, pair in named.items():
        layer, dot, leaf = theirs.rpartition(".")
        ours[(places.get(layer, layer) + dot + leaf).replace(TRUNK, "img_encoder.trunk.", 1)] = pair
    # CXR-CLIP prepares images for a ResNet as ImageNet's are
    imagenet = any(theirs.startswith("image_encoder.resnet.") for theirs in tensors)

    def network() -> ImageClassifier:
        made = ImageClassifier(encoder(), classes, hidden_dim=hidden if norm else 0)
        made.pixels = {"norm": "imagenet" if imagenet else "half"}
        return made

    return Translation(CLASSIFIER, network, ours, ignored)


def _unet(tensors: Mapping[str, Tensor], stored: Stored) -> Translation:
    named, ignored = base.renamed(tensors, UNET_RULES)
    name, classes = network_name(base.shapes_of(named, "encoder.")), len(named["segmentation_head.0.weight"][1])
    network = partial(unet, name, classes=classes, **_input_channels(named, "encoder."))
    return Translation(UNET, network, named, ignored)


def _input_channels(named: Named, prefix: str) -> dict[str, int]:
    """Channels of the images that the network reads, as its argument."""
    firsts = (prefix + name for name in FIRST_FILTERS)
    return {"in_channels": next(named[name][1].shape[1] for name in firsts if name in named)}


LAYOUTS = (
    Layout(ENCODER, lambda shapes, stored: is_one_network(shapes), _encoder),
    Layout(CLASSIFIER, _is_classifier, _classifier),
    # encoder, decoder and segmentation head of the library's names, on a ResNet
    Layout(UNET, lambda shapes, stored: {name.removeprefix("model.") for name in shapes} >= UNET_MARKS, _unet),
)
