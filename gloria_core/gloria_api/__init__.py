"""The programming interface of GLoRIA's README (github.com/marshuang80/gloria), over this package.

    import gloria_core as gloria
    model = gloria.load_gloria(device="cpu", tokenizer="Bio_ClinicalBERT/vocab.txt")
    texts = model.process_class_prompts(gloria.generate_chexpert_class_prompts(), "cpu")
    images = model.process_img(paths, "cpu")
    gloria.zero_shot_classification(model, images, texts)

Names, order of arguments, defaults and what is returned are the original's; further arguments come by keyword only.
Where the released code does what nobody wants, the default here is what one would expect, and the original is one named
switch away:

| switch                    | default ("corrected")                     | the released code                            |
|---------------------------|-------------------------------------------|----------------------------------------------|
| `behavior="published"`    | a text's words are compared               | as many word columns as it has *characters*  |
|                           | every word of a text counts               | sentences of one word vanish ("Edema" is "") |
|                           | shorter side of an image rounded          | cut, so that some squares lose a line        |
| `batch_statistics=True`   | BatchNorm uses its stored statistics      | those of the batch, which it also stores     |
| `seed=None` (prompts)     | the same prompts on every call            | drawn from Python's global generator         |
"""
