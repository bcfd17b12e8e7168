"""NeVA: archives that NeMo wrote, LLaVA of transformers to archives and back, and layouts, against torch's own slices."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import ckptconv
from ckptconv.combine import prepare_extract
from ckptconv.config import projector_config
from ckptconv.executor.execute import ExecuteOptions, execute
from ckptconv.nemo.neva_config import problems
from ckptconv.pipeline import Job
from ckptconv.testing.checkpoints import write_hf
from tests.nemo.conftest import Archive, packed
from tests.unit.helpers.dcp import save
from tests.unit.helpers.nemo import NEVA, TORCH_DIST, contents
from tools.golden_cases import convert
from tools.golden_checks import hf_leaves
from tools.golden_nemo import loaded, members, torch_dist

GOLDEN = Path(__file__).parents[1] / "golden" / "nemo"
TOKENIZER = GOLDEN / "tokenizers" / "output.model"  # 392 tokens: the eight that NeVA adds are the last
INSIDE = "model.embedding.word_embeddings."
PROJECTOR = INSIDE + "adapter_layer.mm_projector_adapter.mm_projector."
ENCODER = INSIDE + "vision_encoder."
CONFIG = "model_config.yaml"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`, transformers' LLaVA of 384 tokens, and `vision`, its CLIP tower alone."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(1)
    text = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, vocab_size=384,
        max_position_embeddings=128,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=383)
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(folder / "whole")
    model.model.vision_tower.save_pretrained(folder / "vision")
    return folder


def ranks(path: Path) -> dict[str, State]:
    """Each rank's file as torch reads it."""
    return {name: loaded(data) for name, data in members(path).items() if name.endswith(".ckpt")}


def settings(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(members(path)[CONFIG])
    return table


def tower_of(whole: Path) -> State:
    """The image encoder of a LLaVA, in the names that NeVA has for it."""
    tensors = load_file(whole / "model.safetensors")
    named = {name.rpartition("vision_tower.")[2]: t for name, t in tensors.items() if "vision_tower." in name}
    return {f"{ENCODER}vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in named.items()}


def projector_of(whole: Path) -> State:
    tensors = load_file(whole / "model.safetensors")
    places = {"linear_1": "0", "linear_2": "2"}
    named = {name.rpartition("multi_modal_projector.")[2]: t for name, t in tensors.items() if "projector" in name}
    return {f"{PROJECTOR}{places[name.partition('.')[0]]}.{name.partition('.')[2]}": t for name, t in named.items()}


def alike(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# archives of NeMo


def test_a_projector_alone_is_read_cut_and_joined(archive: Archive, tmp_path: Path) -> None:
    """Every tensor rank of the first stage has it, other stages have nothing; back it is what torch reads of NeMo's file."""
    theirs, _ = torch_dist(members(archive(NEVA)))
    convert(archive(NEVA), tmp_path / "cut.nemo", tp=2, pp=2)
    files = ranks(tmp_path / "cut.nemo")
    assert sorted(files) == [f"tp_rank_0{t}_pp_rank_00{p}/model_weights.ckpt" for t in (0, 1) for p in (0, 1)]
    for name, state in files.items():
        assert alike(state, theirs if "pp_rank_000" in name else {})
    convert(tmp_path / "cut.nemo", tmp_path / "back.nemo", tp=1, pp=1, saver_options={"weights": "distributed"})
    assert alike(torch_dist(members(tmp_path / "back.nemo"))[0], theirs)
    said, ours = settings(archive(NEVA)), settings(tmp_path / "back.nemo")
    assert ours.pop("tokenizer")["model"].endswith("tokenizer.model")
    assert said.pop("tokenizer")["model"].endswith("output.model")
    assert ours == said


def test_stages_that_nemo_cannot_make_are_refused(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(ckptconv.CkptconvError, match="4 layers of the language model cannot be dealt to 3"):
        convert(archive(NEVA), tmp_path / "cut.nemo", pp=3)


def distributed(tmp_path: Path, more: State) -> tuple[Path, State]:
    """The names and shapes of a fine-tuned model that NeMo saved, filled and written by torch."""
    table = json.loads((GOLDEN / "configs" / "keys.json").read_text())["neva_fin"][0]["tensors"]
    torch.manual_seed(2)
    state = {name: torch.randn(shape) for name, (shape, _) in table.items()} | more
    save(dict(state), tmp_path / "model_weights")
    held = {f"model_weights/{path.name}": path.read_bytes() for path in (tmp_path / "model_weights").iterdir()}
    config = (GOLDEN / "configs" / "neva_fin.yaml").read_bytes()
    tokenizer = yaml.safe_load(config)["tokenizer"]["model"].removeprefix("nemo:")
    return packed({CONFIG: config, tokenizer: TOKENIZER.read_bytes(), **held}, tmp_path / "neva.nemo"), state


def test_what_nemo_calls_its_tensors_is_cut_as_the_language_model_and_copied_as_the_rest(
    llava: Path, tmp_path: Path
) -> None:
    source, state = distributed(tmp_path, tower_of(llava / "whole"))
    options: dict[str, object] = {"vision_heads": 4}
    convert(source, tmp_path / "cut.nemo", tp=2, pp=2, loader_options=options)
    whole = {name: tensor for name, tensor in state.items() if name.startswith((PROJECTOR, ENCODER))}
    for name, rank in ranks(tmp_path / "cut.nemo").items():
        assert alike({k: v for k, v in rank.items() if k in whole}, whole if "pp_rank_000" in name else {})
        tp = int(name[8:10])
        halves = state["model.decoder.layers.mlp.linear_fc1.weight"][2 * int("pp_rank_001" in name)].chunk(2)
        assert torch.equal(
            rank["model.decoder.layers.0.mlp.linear_fc1.weight"], torch.cat([h.chunk(2)[tp] for h in halves])
        )
        assert not [key for key in rank if key.endswith("_extra_state")]  # NeVA saves parameters alone
    back = {"weights": "distributed"}
    convert(tmp_path / "cut.nemo", tmp_path / "back.nemo", tp=1, pp=1, loader_options=options, saver_options=back)
    found, entries = torch_dist(members(tmp_path / "back.nemo"))
    assert alike(found, state)
    layer = f"{ENCODER}vision_model.encoder.layers.0.mlp.fc1.weight"
    assert len(entries[layer].chunks) == 1  # one of the encoder's layers, not all of them in one tensor


# LLaVA of transformers


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}, {"tp": 8}], ids=["whole", "tp2-pp2", "tp8"])
@pytest.mark.parametrize("legacy", [False, True], ids=["mcore", "legacy"])
def test_llava_becomes_an_archive_and_comes_back(
    layout: dict[str, Any], legacy: bool, llava: Path, tmp_path: Path
) -> None:
    source = llava / "whole"
    if legacy:
        source = without_groups(llava / "whole", tmp_path / "mha")
    options: dict[str, object] = {"tokenizer": TOKENIZER, "mcore_gpt": str(not legacy).lower(), "weights": "ranks"}
    convert(source, tmp_path / "a.nemo", saver="nemo", saver_options=options, **layout)
    expected = projector_of(source) | tower_of(source)
    if legacy:
        expected = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in expected.items()}
    for name, state in ranks(tmp_path / "a.nemo").items():
        held = {key: value for key, value in state.items() if ".adapter_layer." in key or ".vision_encoder." in key}
        assert alike(held, {} if "pp_rank_001" in name else expected)
    known = {"vision_heads": 4}
    convert(
        tmp_path / "a.nemo", tmp_path / "hf", saver="hf", vocab_size=384, loader_options=known, saver_options={"template": source}
    )  # fmt: skip
    assert hf_leaves(tmp_path / "hf") == hf_leaves(source)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def without_groups(source: Path, folder: Path) -> Path:
    """The same with as many key and value heads as heads, which legacy models must have."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if "language_model" in name and name.split(".")[-2] in ("k_proj", "v_proj"):
            tensors[name] = torch.cat([tensors[name], tensors[name]])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_key_value_heads"] = 8
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


@pytest.mark.parametrize(("tp", "rows"), [(1, 512), (2, 512), (4, 512), (8, 1024)])
def test_vocabulary_has_the_added_tokens_and_is_padded_for_every_rank(
    tp: int, rows: int, llava: Path, tmp_path: Path
) -> None:
    convert(
        llava / "whole", tmp_path / "a.nemo", saver="nemo", tp=tp, saver_options={"tokenizer": TOKENIZER, "weights": "ranks"}
    )  # fmt: skip
    tables = [state[f"{INSIDE}weight"] for _, state in sorted(ranks(tmp_path / "a.nemo").items())]
    assert torch.cat(tables).shape == (rows, 64)
    assert not torch.cat(tables)[384:].any()
    said = settings(tmp_path / "a.nemo")
    assert (said["make_vocab_size_divisible_by"], said.get("override_vocab_size")) == (128, None)
    assert ckptconv.load(tmp_path / "a.nemo", loader_options={"vision_heads": 4}).config.vocab == 392


def test_an_encoder_that_is_not_trained_stays_out_and_is_put_in(llava: Path, tmp_path: Path) -> None:
    options = {"tokenizer": TOKENIZER, "frozen_vision": True, "vision_encoder": "clip/of/mine"}
    convert(llava / "whole", tmp_path / "a.nemo", saver="nemo", saver_options=options)
    state, _ = torch_dist(members(tmp_path / "a.nemo"))
    names = json.loads((GOLDEN / "configs" / "keys.json").read_text())["neva_fin"][0]["tensors"]
    assert state.keys() == names.keys()
    said = settings(tmp_path / "a.nemo")["mm_cfg"]
    assert (said["vision_encoder"]["freeze"], said["llm"]["freeze"]) == (True, False)
    assert (said["vision_encoder"]["from_pretrained"], said["vision_encoder"]["crop_size"]) == (
        "clip/of/mine",
        [28, 28],
    )
    given = {"vision_encoder": llava / "vision"}
    convert(
        tmp_path / "a.nemo", tmp_path / "hf", saver="hf", vocab_size=384, loader_options=given,
        saver_options={"template": llava / "whole"},
    )  # fmt: skip
    assert hf_leaves(tmp_path / "hf") == hf_leaves(llava / "whole")
    notes = ckptconv.load(tmp_path / "a.nemo").extras.notes
    assert any("clip/of/mine" in note and "--loader.vision-encoder" in note for note in notes)


def test_a_trained_encoder_is_not_replaced_without_a_word(llava: Path, tmp_path: Path) -> None:
    convert(llava / "whole", tmp_path / "a.nemo", saver="nemo", saver_options={"tokenizer": TOKENIZER})
    with pytest.raises(ckptconv.CkptconvError, match=r"leave --loader\.vision-encoder out"):
        ckptconv.load(tmp_path / "a.nemo", loader_options={"vision_encoder": llava / "vision"})
    with pytest.raises(ckptconv.CkptconvError, match=r"--loader\.vision-heads"):
        ckptconv.load(tmp_path / "a.nemo")


def test_heads_of_an_option_and_of_a_config_must_agree(archive: Archive, llava: Path, tmp_path: Path) -> None:
    convert(llava / "whole", tmp_path / "a.nemo", saver="nemo", saver_options={"tokenizer": TOKENIZER})
    for source, stated in (
        (tmp_path / "a.nemo", {"config": llava / "whole"}),
        (archive(NEVA), {"vision_encoder": llava / "vision"}),
    ):
        assert ckptconv.load(source, loader_options={**stated, "vision_heads": 4}).config.towers["vision"].heads == 4
        with pytest.raises(ckptconv.CkptconvError, match=r"--loader\.vision-heads 2, but the config .* says 4"):
            ckptconv.load(source, loader_options={**stated, "vision_heads": 2})


def test_settings_are_those_of_nemos_own_converter(llava: Path, tmp_path: Path) -> None:
    """mm_cfg and data of an archive that convert_llava_hf_to_nemo.py made of a model of these sizes."""
    options = {"tokenizer": TOKENIZER, "frozen_vision": True, "vision_encoder": "openai/clip-vit-large-patch14"}
    convert(llava / "whole", tmp_path / "a.nemo", saver="nemo", saver_options=options)
    theirs, ours = yaml.safe_load((GOLDEN / "configs" / "neva_fin.yaml").read_text()), settings(tmp_path / "a.nemo")
    # "patch" is what NeMo takes where nothing is said; tokens of an image are 256 in its files whatever the image is
    assert ours["mm_cfg"]["vision_encoder"].pop("vision_select_feature") == "patch"
    assert (ours["data"].pop("image_token_len"), theirs["data"].pop("image_token_len")) == (4, 256)
    assert ours["mm_cfg"] == theirs["mm_cfg"]
    assert ours["data"] == theirs["data"]
    assert ours["target"] == theirs["target"]


@pytest.mark.parametrize("prefix", ["model.", "model.module."])
def test_old_spellings_are_read(prefix: str, archive: Archive, llava: Path, tmp_path: Path) -> None:
    """A projector of one layer under the name that it had until NeMo 1.22, and names of the half precision wrapper."""
    convert(archive(TORCH_DIST), tmp_path / "language.nemo", saver_options={"weights": "ranks"})
    files = contents(tmp_path / "language.nemo")
    model = torch.load(io.BytesIO(files["model_weights.ckpt"]), weights_only=False)
    old = "embedding.word_embeddings.adapter_layer.mm_linear_adapter.linear."
    linear = {f"model.{old}weight": torch.randn(64, 32), f"model.{old}bias": torch.randn(64)}
    buffer = io.BytesIO()
    torch.save({key.replace("model.", prefix, 1): value for key, value in (model | linear).items()}, buffer)
    source = packed({**files, "model_weights.ckpt": buffer.getvalue()}, tmp_path / "old.nemo")
    checkpoint = ckptconv.load(source)
    assert checkpoint.config.towers["projector"].linear
    convert(source, tmp_path / "new.nemo", dtype="fp32")
    (state,) = ranks(tmp_path / "new.nemo").values()
    assert torch.equal(state[f"{PROJECTOR}weight"], linear[f"model.{old}weight"])
    assert settings(tmp_path / "new.nemo")["mm_cfg"]["mm_mlp_adapter_type"] == "linear"


def test_a_language_model_taken_out_is_no_neva(llava: Path, tmp_path: Path) -> None:
    convert(llava / "whole", tmp_path / "a.nemo", saver="nemo", saver_options={"tokenizer": TOKENIZER})

    job = Job(tmp_path / "a.nemo", saver="nemo", loader_options={"vision_heads": 4})
    execute(prepare_extract(job, "lm").plan, tmp_path / "lm.nemo", ExecuteOptions())
    said = settings(tmp_path / "lm.nemo")
    assert "mm_cfg" not in said
    assert said["target"].endswith("MegatronGPTModel")
    convert(tmp_path / "lm.nemo", tmp_path / "mcore", saver="mcore")


def test_parts_that_neva_does_not_have_are_refused(tmp_path: Path) -> None:
    """Megatron's projector has other sizes than NeVA's."""

    wrong = projector_config(32, 128, 64, pre_norm=True)
    assert len(list(problems(wrong))) == 3
    write_hf(tmp_path / "hf", "llama")
    assert list(problems(ckptconv.load(tmp_path / "hf").config)) == []


def test_how_the_projector_is_given_an_image_goes_there_and_back(llava: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llava / "whole", source)
    table = json.loads((source / "config.json").read_text())
    said = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_seq_length": 5}
    (source / "config.json").write_text(json.dumps({**table, **said}))
    convert(source, tmp_path / "a.nemo", saver="nemo", saver_options={"tokenizer": TOKENIZER})
    encoder = settings(tmp_path / "a.nemo")["mm_cfg"]["vision_encoder"]
    assert (encoder["vision_select_layer"], encoder["vision_select_feature"]) == (-1, "cls_patch")
    found = ckptconv.load(tmp_path / "a.nemo", loader_options={"vision_heads": 4}).config
    assert (found.feature_layer, found.feature_select) == (-1, "full")


def test_projector_is_taken_out_of_an_archive_that_holds_no_language_model(
    archive: Archive, llava: Path, tmp_path: Path
) -> None:
    """Alone, or with the image encoder that it was trained behind."""
    made = []
    for name, options in (("alone", {}), ("beside", {"vision_encoder": llava / "vision"})):
        job = Job(archive(NEVA), saver="mm-projector", loader_options=options)
        execute(prepare_extract(job, "projector").plan, tmp_path / f"{name}.bin")
        made.append((tmp_path / f"{name}.bin").read_bytes())
    assert made[0] == made[1]
