"""What `model_config.yaml` says of NeVA and of no language model: `mm_cfg`, its data section, and the class that reads them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass

from ckptconv.config import ModelConfig
from ckptconv.nemo import settings as gpt
from ckptconv.nemo.neva import ENCODERS, FEATURES

TARGET = "nemo.collections.multimodal.models.multimodal_llm.neva.neva_model.MegatronNevaModel"
PARTS: Dict[str, object] = {
    "llm": {"from_pretrained": None, "freeze": False, "model_type": "v1"},
    "vision_encoder": {
        "from_pretrained": None,
        "from_hf": True,
        "patch_dim": 14,
        "crop_size": [224, 224],
        "hidden_size": None,
        "vision_select_layer": -2,
        "class_token_length": 1,
        "freeze": True,
    },
    "pretrain_mm_mlp_adapter": None,
    "mm_mlp_adapter_type": "mlp2x_gelu",
    "use_im_start_end": False,
}
DATA: Dict[str, object] = {
    "num_workers": 8,
    "dataloader_type": "cyclic",
    "data_path": None,
    "lazy_preprocess": True,
    "is_multimodal": True,
    "media_type": "image",
    "sep_image_conv_front": False,
    "image_token_len": 256,
    "conv_template": "v1",
    "image_folder": None,
    "image_aspect_ratio": "square",
}
PUBLISHED = {  # (hidden, layers, patch, image) -> what NeMo loads the encoder by
    (1024, 24, 14, 224): "openai/clip-vit-large-patch14",
    (1024, 24, 14, 336): "openai/clip-vit-large-patch14-336",
    (1152, 27, 14, 384): "google/siglip-so400m-patch14-384",
}


@dataclass(frozen=True, slots=True)
class Encoder:
    """What NeMo loads the image encoder by (None: as the source says, or by a published name), and if the file lacks it."""

    name: str | None = None
    left_out: bool = False


AS_SAID = Encoder()


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a model that a NeVA archive is of; `language`: whether its language model is in the file."""

    language: bool
    projector: ModelConfig | None
    vision: ModelConfig | None


def parts(config: ModelConfig) -> Parts:
    projector = config if config.kind == "projector" else config.towers.get("projector")
    return Parts(config.kind == "text", projector, config.towers.get("vision"))


def is_neva(config: ModelConfig) -> bool:
    return config.kind == "projector" or bool(config.towers)


def problems(config: ModelConfig) -> Iterator[str]:
    """What NeVA would build otherwise."""
    projector, vision = parts(config).projector, parts(config).vision
    if vision is not None and vision.family not in ENCODERS:
        yield f"an image encoder of the family {vision.family}: it knows {' and '.join(ENCODERS)}"
    if projector is None:
        return
    if not projector.mlp_bias:
        yield "a projector without biases"
    if projector.pre_norm:
        yield "a projector with a norm in front"
    if not projector.linear and projector.ffn != projector.hidden:
        yield f"a projector of {projector.ffn} entries inside and {projector.hidden} out: its two layers have one size"
    if not projector.linear and projector.activation != "gelu":
        yield f"a projector with {projector.activation!r}: its is gelu"


def adapt(settings: dict[str, object], config: ModelConfig, encoder: Encoder) -> None:
    """The sections for this model, in place: those of NeVA, or away with them."""
    if not is_neva(config):
        if settings.pop("mm_cfg", None) is not None:
            settings |= {"target": gpt.TARGET, "data": copy.deepcopy(dict(gpt.DATA))}
        return
    held = parts(config)
    mm = settings.setdefault("mm_cfg", copy.deepcopy(dict(PARTS)))
    assert isinstance(mm, dict)
    mm["llm"] = {**_table(mm, "llm"), "freeze": not held.language}
    mm["vision_encoder"] = _encoder(_table(mm, "vision_encoder"), config, held, encoder)
    if held.projector is not None:
        mm["mm_mlp_adapter_type"] = "linear" if held.projector.linear else "mlp2x_gelu"
    data = _table(settings, "data")
    data = data if data.get("is_multimodal") else copy.deepcopy(dict(DATA))
    if held.vision is not None:
        data["image_token_len"] = (held.vision.image // held.vision.patch) ** 2
    settings |= {"data": data, "target": TARGET}


def _encoder(said: dict[str, object], config: ModelConfig, held: Parts, encoder: Encoder) -> dict[str, object]:
    """A source's own words are kept where the model says nothing else."""
    said = {**said, "freeze": held.vision is None or encoder.left_out}
    if held.projector is not None:
        said["hidden_size"] = held.projector.inputs
    if (vision := held.vision) is not None:
        said |= {
            "from_hf": True,
            "patch_dim": vision.patch,
            "crop_size": [vision.image, vision.image],
            "hidden_size": vision.hidden,
            "class_token_length": vision.class_tokens,
        }
    if config.feature_layer is not None:
        said["vision_select_layer"] = config.feature_layer
    if config.feature_select is not None:
        said["vision_select_feature"] = next(word for word, ours in FEATURES.items() if ours == config.feature_select)
    return {**said, "from_pretrained": _name(said, held.vision, encoder)}


def encoder_name(config: ModelConfig, source: Dict[str, object], encoder: Encoder) -> str | None:
    """The name or path that NeMo will load the image encoder by, with its weights or before them; `source` is a NeMo source's section."""
    return _name(_table(_table(source, "mm_cfg"), "vision_encoder"), parts(config).vision, encoder)


def _name(said: Dict[str, object], vision: ModelConfig | None, encoder: Encoder) -> str | None:
    known = PUBLISHED.get((vision.hidden, vision.layers, vision.patch, vision.image)) if vision else None
    carried = said.get("from_pretrained")
    return encoder.name or (carried if isinstance(carried, str) else None) or known


def _table(table: Dict[str, object], key: str) -> dict[str, object]:
    found = table.get(key)
    return dict(found) if isinstance(found, dict) else {}
