"""Every built-in format and every mapping file keeps the contract that plug-ins are held to."""

from __future__ import annotations

from typing import Any

import pytest

from ckptconv.formats import ReadOnly
from ckptconv.formats.hf import Hf
from ckptconv.formats.legacy import Legacy
from ckptconv.formats.mcore import Mcore
from ckptconv.formats.mcore_dist import McoreDist
from ckptconv.formats.nemo import Nemo
from ckptconv.formats.nemo2 import Nemo2
from ckptconv.formats.openai_clip import OpenaiClip
from ckptconv.mapping_files import mapping_paths
from ckptconv.registry import BUILT_IN, formats
from ckptconv.testing import FormatContract, MappingContract
from ckptconv.testing.mapping_contract import SHAPES, is_language_model
from ckptconv.testing.workbench import PARTS_ALONE


class TestHf(FormatContract):
    format = Hf()
    refuses = ({"tp": 2}, {"pp": 2}, {"ep": 2})
    options = ({}, {"max-shard-size": "30KB"})


class TestMcore(FormatContract):
    format = Mcore()
    models = ("llama", "llama-tied", "llama-bias", "qwen3", "mixtral")
    topologies = ({}, {"tp": 2, "pp": 2}, {"tp": 8}, {"pp": 2, "vpp": 2}, {"tp": 2, "ep": 2})
    refuses = ({"tp": 3}, {"pp": 3}, {"tp": 2, "etp": 4})
    options = (
        {},
        {"transformer-impl": "local"},
        {"mcore-version": "0.9"},
        {"te-version": "1.8", "iteration": "release"},
        {"iteration": "7"},
    )


class TestLegacy(FormatContract):
    format = Legacy()
    models = ("llama", "llama-tied", "llama-bias", "qwen2")
    topologies = ({}, {"tp": 2, "pp": 2}, {"tp": 4}, {"pp": 2, "vpp": 2})
    refuses = ({"tp": 3}, {"tp": 8}, {"ep": 2})
    options = ({}, {"iteration": "release"})


class TestMcoreDist(FormatContract):
    format = McoreDist()
    models = ("llama", "llama-tied", "llama-bias", "qwen3", "mixtral")
    refuses = ({"tp": 2}, {"pp": 2}, {"ep": 2})
    options = (
        {},
        {"layers": "separate", "files": "3"},
        {"chunk": "whole", "transformer-impl": "local"},
        {"mcore-version": "0.9", "te-version": "1.8", "iteration": "release"},
        {"backend": "zarr", "mcore-version": "0.12"},
    )


class TestNemo(FormatContract):
    """Over tensor ranks the vocabulary is padded, and its true size is the tokenizer's, which models here lack: see tests/nemo."""

    format = Nemo()
    models = ("llama", "llama-tied", "qwen2", "qwen3", "mixtral")
    topologies = ({}, {"pp": 2}, {"pp": 4})
    refuses = ({"tp": 3}, {"pp": 3}, {"ep": 2})
    options = ({}, {"weights": "ranks", "transformer-impl": "local"}, {"backend": "zarr"}, {"pack": "false"})
    to_hf = False  # a Hugging Face family cannot be told from an archive


class TestNemo2(FormatContract):
    format = Nemo2()
    models = ("llama", "llama-tied", "qwen2", "qwen3", "mixtral")
    refuses = ({"tp": 2}, {"pp": 2}, {"ep": 2})
    options = ({}, {"transformer-impl": "local"}, {"te-version": "1.11"})
    to_hf = False  # what a config.json says besides is not in a context


class TestOpenaiClip(FormatContract):
    """Its heads are 64 wide, as in all that OpenAI has published."""

    format = OpenaiClip()
    models = ("clip",)
    refuses = ({"tp": 2}, {"pp": 2}, {"ep": 2})
    to_hf = False  # without config.json


ALIKE = tuple(name for name, config in SHAPES.items() if is_language_model(config) and name != "moe-some-layers")
TOWERS = {
    "shapes": tuple(name for name, config in SHAPES.items() if config.kind == "vision"),
    "layouts": ("whole", "tp2", "tp8"),
}
WHOLE_MODELS = {"shapes": ("llava", "llava-next", "llava-moe", "internvl"), "layouts": ("whole", "tp2", "pp2-vpp2")}
MAPPINGS: dict[str, dict[str, Any]] = {
    "clip-in-llava": {"shapes": ("clip-64",), "own_config": False},
    "clip-names": {"shapes": ("clip",), "layouts": ("whole",)},
    "hf-internvl": {"mapping": "hf-internvl(hf-qwen2,hf-internvl-vision)", "shapes": ("internvl",)},
    "hf-internvl-chat": {"mapping": "hf-internvl-chat(hf-internvit,hf-qwen2)", "shapes": ("internvl",)},
    "hf-llava": {"mapping": "hf-llava(hf-llama,hf-clip)", "shapes": ("llava",)},
    "hf-llava-liuhaotian": {
        "mapping": "hf-llava-liuhaotian(hf-llama,clip-in-llava)",
        "shapes": ("llava", "llava-next"),
    },
    "hf-llava-next": {"mapping": "hf-llava-next(hf-llama,hf-clip)", "shapes": ("llava-next",)},
    "hf-nvlm": {"mapping": "hf-nvlm(hf-internvit,hf-qwen2)", "shapes": ("nvlm",)},
    "mcore-dist": {"layouts": ("whole", "tp2"), "refuses": ("tp2",)},
    "mcore-dist-singleton": {"layouts": ("whole", "pp2-vpp2"), "refuses": ("pp2-vpp2",)},
    "mcore-dist-stacked": {"shapes": ALIKE, "layouts": ("whole", "tp2-ep2"), "refuses": ("tp2-ep2",)},
    "mcore-dist-vision": {**TOWERS, "layouts": ("whole", "tp2"), "refuses": ("tp2",)},
    "mcore-dist-vlm": {**WHOLE_MODELS, "refuses": ("tp2", "pp2-vpp2")},
    "mcore-dist-vlm-stacked": {**WHOLE_MODELS, "refuses": ("tp2", "pp2-vpp2")},
    "mcore-local": {"layouts": ("whole", "tp2", "tp4-ep2-etp1")},  # the cuts are mcore's
    "mcore-vision": TOWERS,
    "mcore-vision-local": TOWERS,
    "mcore-vlm": WHOLE_MODELS,
    "mcore-vlm-local": WHOLE_MODELS,
    "megatron-legacy": {
        "shapes": ("dense", "tied", "qkv-bias", "biases", "layernorm"),
        "layouts": ("whole", "tp4-pp2", "pp2-vpp2", "uneven", "tp8"),
        "refuses": ("tp8",),
        "told_by_names": False,
    },
    "mm-projector": {"shapes": ("projector", "projector-linear"), "layouts": ("whole",)},
    "openai-clip": {"shapes": ("clip", "clip-projected"), "layouts": ("whole",)},
    "nemo-adapter": {
        "mapping": "nemo-adapter(hf-clip)",
        "shapes": ("projector", "projector-linear", "projector-vision"),
        "layouts": ("whole", "tp2", "tp4-pp2"),
    },
    "nemo-neva": {
        "mapping": "nemo-neva(nemo-mcore,hf-clip)",
        "shapes": ("llava", "llava-next", "llava-moe"),
        "layouts": ("whole", "tp2", "pp2-vpp2", "tp4-ep2-etp1"),
    },
    "nemo-mcore": {"layouts": ("whole", "tp2", "tp4-ep2-etp1")},
    "nemo-mcore-local": {"layouts": ("whole", "tp2", "tp4-ep2-etp1")},
}
MAPPINGS["nemo-legacy"] = MAPPINGS["megatron-legacy"]


class TestInternvlChatOfInternlm2(MappingContract):
    mapping = "hf-internvl-chat(hf-internvit,hf-internlm2)"
    shapes = ("internvl-internlm2",)


for _name in mapping_paths():
    globals()[f"Test_{_name}"] = type(
        f"Test_{_name}", (MappingContract,), {"mapping": _name, **MAPPINGS.get(_name, {}), "__module__": __name__}
    )


def test_every_built_in_format_has_its_contract() -> None:
    held = {c.format.name for c in (TestHf, TestMcore, TestMcoreDist, TestLegacy, TestNemo, TestNemo2, TestOpenaiClip)}
    read_only = {name for name, (_, fmt) in formats().items() if isinstance(fmt, ReadOnly)}
    apart = {"dcp", "lightning", "mm-projector"}
    assert read_only | set(PARTS_ALONE) == apart, (
        "these have tests of their own: test_dcp_format.py, tests/nemo2, tests/vision/test_mm_projector.py"
    )
    assert held | apart == set(BUILT_IN) == {name for name, (origin, _) in formats().items() if origin == "built-in"}


def test_every_mapping_is_found_by_name() -> None:
    with pytest.raises(KeyError):
        mapping_paths()["canonical"]
    assert set(MAPPINGS) <= set(mapping_paths())
