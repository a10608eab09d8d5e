"""The most likely classes of a photo, by an exported model in ONNX Runtime: python onnx_inference.py FOLDER PHOTO
[model.int8.onnx]"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

folder, photo = Path(sys.argv[1]), sys.argv[2]
config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
form = config["pretrained_cfg"]  # the preprocessing in timm's words
channels, side, _ = form["input_size"]
image = ImageOps.exif_transpose(Image.open(photo)).convert("L" if channels == 1 else "RGB")
scale = int(side / form["crop_pct"]) / min(image.size)
image = image.resize([round(scale * length) for length in image.size], Image.Resampling[form["interpolation"].upper()])
left, top = (round((length - side) / 2) for length in image.size)
pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32).reshape(side, side, channels) / 255
pixels = ((pixels - form["mean"]) / form["std"]).astype(np.float32).transpose(2, 0, 1)[None]
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # int8 overflows on x86 without VNNI otherwise
session = onnxruntime.InferenceSession(folder / (sys.argv[3] if len(sys.argv) > 3 else "model.onnx"), options)
logits = session.run(None, {session.get_inputs()[0].name: pixels})[0][0]
for index in np.argsort(-logits)[:5]:
    print(f"{config.get('label_names', range(len(logits)))[index]}: {logits[index]:.3f}")
