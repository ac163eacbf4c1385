"""Every objective learns on every family of image encoders, with gray or RGB input."""

import numpy as np
import pandas as pd
import pytest
import torch

from gloria_core import objectives
from gloria_core.checkpoints.model import ModelConfig, build_model
from gloria_core.data.dataset import StudyDataset
from gloria_core.data.tokenizer import train_wordpiece
from gloria_core.tasks.features import text_features
from gloria_core.types import Batch

TOKENIZER = train_wordpiece(["small left effusion .", "no edema or consolidation", "the heart is large"], vocab_size=64)
FAMILIES = {"vit_tiny_patch16": 3, "swin_tiny": 3, "densenet121": 1, "efficientnet_lite0": 1, "resnet18": 3}


@pytest.mark.parametrize(("encoder", "channels"), FAMILIES.items())
@pytest.mark.parametrize("name", objectives.available())
def test_one_step_lowers_the_loss(name, encoder, channels, make_texts):
    method = objectives.objective_class(name)
    torch.manual_seed(0)
    small = {"options": {"decoder_layers": 1, "embed_dim": 32}} if name == "prior" else {}
    config = ModelConfig(
        objective=name,
        objective_options=small.get("options", {}),
        image_encoder=encoder,
        text_encoder="bert_tiny",
        text_dropout=0.0,
        channels=channels,
        **{"last_layers": 2, **method.encoders},
    )
    model = build_model(config, TOKENIZER).train()
    texts = make_texts(
        [words for words in ([1, 1, 1], [2, 1], [1, 1, 1, 1]) for _ in range(method.needs.texts)],
        vocabulary=len(TOKENIZER),
    )
    pixels = torch.randn(3, method.needs.views, channels, 64, 64)
    batch = Batch(pixels, texts, torch.zeros(3, 0), torch.arange(3))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.manual_seed(1)
    before = model(batch).total
    before.backward()
    assert sum(float(p.grad.abs().sum()) for p in model.image_encoder.parameters() if p.grad is not None) > 0
    with torch.no_grad():
        length = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / length
        torch.manual_seed(1)
        assert model(batch).total < before


@pytest.mark.parametrize("behavior", ["published", "corrected"])
@pytest.mark.parametrize("name", objectives.available())
def test_texts_of_one_word_work_in_every_method(name, behavior):
    """As prompts, and as reports cut by GLoRIA's released rule, which drops sentences of one word."""
    method, words = objectives.objective_class(name), ["Edema", "Normal.", "no", "the heart is large"]
    options = {"decoder_layers": 1, "embed_dim": 32} if name == "prior" else {}
    config = ModelConfig(
        objective=name,
        objective_options=options,
        image_encoder="resnet_tiny",
        text_encoder="bert_tiny",
        behavior=behavior,
        image_size=64,
        crop=64,
        **{"last_layers": 2, **method.encoders},
    )
    model = build_model(config, TOKENIZER).eval()
    texts = text_features(model, words)
    with torch.no_grad():
        images = model.encode_images(torch.randn(4, 3, 64, 64))
        assert model.objective.similarity(images, texts.features).isfinite().all()
        if method.rows is not None:
            assert model.objective.attention(images, texts.features).isfinite().all()
    rows = {"study_id": list("abcd"), "images": list("abcd"), "views": "PA", "findings": "", "impression": words}
    frame, cache = pd.DataFrame(rows), dict.fromkeys("abcd", np.arange(4096, dtype=np.uint8).reshape(64, 64))
    needs = {"views": method.needs.views, "texts": method.needs.texts}
    studies = StudyDataset(frame, cache, crop=64, text="impression", sentence="published", labels=[], **needs)
    assert [studies[i].texts[0] for i in range(4)] == words
    assert model.train()(model.collate()([studies[i] for i in range(4)])).total.isfinite()
