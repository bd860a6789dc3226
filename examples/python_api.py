"""The package in Python, from pictures to answers, on the toy world: no files, GPU or Hub needed.

python examples/python_api.py
"""

import tempfile

from accelerate import Accelerator
from peft import get_peft_model

import hf_tgpt
from hf_tgpt.data import FewShotImages, ImageTransform, class_names, sample_few_shot
from hf_tgpt.encoders.loading import load_image_processor
from hf_tgpt.evaluation.accuracy import evaluation_loader
from hf_tgpt.methods.zero_shot import zero_shot_beside

# 1. Pictures: "toyworld:..." here, else a folder with a folder for each class; four training pictures of a class.
data = hf_tgpt.load_splits("toyworld:unseen_triples/negative")
names = class_names(data["train"])
few = sample_few_shot(data["train"], 4, seed=0)

# 2. A base model, here the toy CLIP, else a Hub id, and what makes pixel values of pictures.
base = hf_tgpt.TOY_CLIP  # "openai/clip-vit-base-patch16"
processor = load_image_processor(base)
training = FewShotImages(few, ImageTransform.from_processor(processor, train=True))
accelerator = Accelerator()
held_out = FewShotImages(data["test"], ImageTransform.from_processor(processor, train=False))
test = evaluation_loader(held_out, accelerator)

# 3. A head on frozen features, fitted in one pass over the pictures, beside zero-shot.
model = hf_tgpt.fit(get_peft_model(hf_tgpt.load_clip(base), hf_tgpt.GDAConfig(class_names=names)), few)
zero_shot = hf_tgpt.evaluate(zero_shot_beside(model, names), test, accelerator)["accuracy"]
print(f"zero-shot {zero_shot:.3f}, GDA {hf_tgpt.evaluate(model, test, accelerator)['accuracy']:.3f}")

# 4. Prompts in both towers, trained step by step; your own loop and transformers' Trainer do as well.
prompted = get_peft_model(hf_tgpt.load_clip(base), hf_tgpt.MaPLeConfig(class_names=names, prompt_depth=3))
with tempfile.TemporaryDirectory() as checkpoints:
    config = hf_tgpt.TrainingConfig(learning_rate=0.01, batch_size=8, max_steps=20)
    hf_tgpt.train(prompted, training, config, accelerator, checkpoints)
print(f"MaPLe after 20 steps {hf_tgpt.evaluate(prompted, test, accelerator)['accuracy']:.3f}")

# 5. Saved, loaded and used: a picture, other classes for a method that classifies by text, a new class by pictures.
with tempfile.TemporaryDirectory() as folder:
    prompted.save_pretrained(folder)
    classifier = hf_tgpt.load_classifier(folder)
    picture = data["test"][0]["image"]
    print(classifier(picture, top_k=2))
    print(classifier(picture, class_names=["red things", "blue things"]))
hf_tgpt.add_classes(model, {"something else": [row["image"] for row in data["train"].select(range(3))]})
print(f"GDA has {len(model.class_names)} classes now")
