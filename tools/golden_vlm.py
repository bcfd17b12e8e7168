"""Runs every vision and vision-language output of Megatron-LM's own tools through ckptconv and prints a table; exits 1 on a difference.

usage: python tools/golden_vlm.py FOLDER [--only TEXT]
FOLDER holds clip, internvit, siglip and radio_g (a source, and what Megatron's converters made of it), lm_*, combine_*, pp and
llava_siglip. A case whose name ends in EXT was made by a tool that had been extended, and says so. A case may have a manifest.json
(tools/make_vlm_manifests.py) in place of its files; its files are then ours, once they are found to be the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))

import ckptconv
from ckptconv.combine import prepare_combine, prepare_extract
from ckptconv.executor.execute import execute
from ckptconv.layout import layout_from
from ckptconv.mapping_files import load_mapping
from tools.golden_cases import Ranks, convert
from tools.golden_checks import differences, hf_leaves
from tools.golden_table import Check, arguments, print_table
from tools.rank_files import FILE, Leaf, leaf, leaves, read

QUICK = ckptconv.ExecuteOptions(durable=False)
TENSORS = "model.safetensors"
CORE = {"mcore_version": "0.12"}
MANIFEST = "manifest.json"
OMITTED = ("norm.weight", "norm.bias", "projection.weight")
LOST = "model/language_model.decoder.final_layernorm.weight"  # by the tool of 0.12 and newer that joins stages
UPCAST = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "q_proj.bias",
    "k_proj.bias",
    "v_proj.bias",
)  # to fp32, by saver_hf_llava
PROJECTOR = {"mlp1.0.weight": "input_norm.weight", "mlp1.1.weight": "fc1.weight", "mlp1.3.weight": "fc2.weight"}


@dataclass(frozen=True)
class Tower:
    """The source of a tower's cases in Hugging Face's names, and what the cases do not say: family, heads.

    `given` is the file the tool had, where that is another; `dropped` is what of the source the tool leaves out.
    """

    name: str
    source: str
    family: str
    heads: int
    given: str = ""
    dropped: tuple[str, ...] = ()

    @property
    def stated(self) -> dict[str, Any]:
        """How Megatron's files of it are opened."""
        return {"family": self.family, "loader_options": {"vision_heads": self.heads}}


TOWERS = {
    tower.name: tower
    for tower in (
        Tower("clip", "clip/src_hf", "clip", 16, "clip/src/model.safetensors", OMITTED),
        Tower("internvit", "internvit/src", "internvit", 25),
        Tower("siglip", "siglip/src", "siglip", 16),
        Tower("radio_g", "radio_g/src", "radio-g", 24),
    )
}
# a combined output -> the outputs it was made of
COMBINED = {
    "combine_mistral_clip_tp2": ("lm_mistral/tp2_te", "clip/tp2_te"),
    "combine_qwen2_internvit_tp2": ("lm_qwen2/tp2_te", "internvit/tp2_te_EXT"),
    "combine_qwen2_siglip_tp4": ("lm_qwen2/tp4_te", "siglip/tp4_te"),
}
WHOLE, CUT = "src_tp2_pp1", "v0.12_1to4"
# what the tool that cuts into stages and joins them made -> from what, how many stages, how many layers in each
STAGES = {
    CUT: (WHOLE, 4, None),
    "v0.11_1to4": (WHOLE, 4, None),
    "v0.12_1to2_uneven": (WHOLE, 2, "1,3"),
    "v0.11_4to1_OK": (CUT, 1, None),
    "v0.12_4to1_BUG": (CUT, 1, None),
}


def ranks(folder: Path) -> Ranks:
    """Rank folder -> entries by name: the tools have the order of their sources, models do not care.

    TransformerEngine was a stand-in when the language models were made, so what it adds to them is left out; what the tools
    themselves put beside a tower's layers is not.
    """
    (iteration,) = folder.glob("iter_*")
    found = {path.parent.name: leaves(read(path)) for path in sorted(iteration.glob(f"*/{FILE}"))}
    return {
        rank: {name: held[name] for name in sorted(held) if not _of_engine(name, held)} for rank, held in found.items()
    }


def _of_engine(name: str, held: dict[str, Leaf]) -> bool:
    """Whether this is TransformerEngine's own entry, beside weights of a language model."""
    tower = any(patches in held for patches in ("model/conv1.weight", "model/embedder.weight"))
    return name.endswith("_extra_state") and not tower and not name.startswith("model/vision_")


def official(case: Path) -> Ranks:
    """What the tool made."""
    path = case / MANIFEST
    if not path.exists():
        return ranks(case / "out")
    told: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return {rank: {name: Leaf.from_json(row) for name, row in held.items()} for rank, held in told.items()}


def against(case: Path, ours: Path) -> list[str]:
    return differences(official(case), ranks(ours))


def files_of(case: Path, make: Check, work: Path) -> Path:
    """The official files, or ours where they are the same as its manifest says."""
    if (case / "out").is_dir():
        return case / "out"
    if wrong := make(work):
        raise AssertionError(f"{case.name}: {wrong[0]}")
    return work


def tp_of(case: Path) -> int:
    """tp2_te, tp8_local, tp2_te_EXT say how they were made."""
    return int(case.name.removeprefix("tp").partition("_")[0])


def impl_of(case: Path) -> dict[str, Any]:
    return {"transformer_impl": "local" if "_local" in case.name else "transformer_engine"}


def hf(folder: Path) -> dict[str, dict[str, Leaf]]:
    return {"hf": hf_leaves(folder)}


# towers


def tower_checks(folder: Path) -> Iterator[tuple[str, str, Check]]:
    for tower in TOWERS.values():
        cases = sorted((folder / tower.name).glob("tp*"))
        for case in cases:
            title = f"{tower.name}/{case.name}"
            for source in filter(None, (tower.given, tower.source)):
                yield title, f"from {source}", partial(tower_from_source, tower, folder / source, case)
            for other in cases:
                if other != case:
                    yield (
                        title,
                        f"from {other.name}",
                        partial(tower_from_ranks, tower, folder / tower.source, other, case),
                    )
            yield title, f"back to {tower.source}", partial(tower_back, tower, folder / tower.source, case)


def tower_from_source(tower: Tower, source: Path, case: Path, work: Path) -> list[str]:
    """The tools make fp32 of what they are given."""
    wishes: dict[str, Any] = {"family": tower.family} if source.is_dir() else {"loader_options": {"heads": tower.heads}}
    convert(source, work, saver="mcore", tp=tp_of(case), dtype="fp32", saver_options=impl_of(case), **wishes)
    return against(case, work)


def tower_from_ranks(tower: Tower, source: Path, other: Path, case: Path, work: Path) -> list[str]:
    start = files_of(other, partial(tower_from_source, tower, source, other), work.with_name("start"))
    convert(start, work, saver="mcore", tp=tp_of(case), saver_options=impl_of(case), **tower.stated)
    return against(case, work)


def tower_back(tower: Tower, source: Path, case: Path, work: Path) -> list[str]:
    """What the official files hold is what the source held; what they lack is what the mapping says, and a template has it."""
    files = files_of(case, partial(tower_from_source, tower, source, case), work.with_name("files"))
    before = {key.name for key in ckptconv.load(source, family=tower.family).tensors}
    lacking = before - {key.name for key in ckptconv.load(files, **tower.stated).tensors}
    wrong = [f"not in the official file: {name}" for name in sorted(lacking ^ set(tower.dropped))]
    wrong += [f"not omitted by the mapping: {name}" for name in lacking if not load_mapping("mcore-vision").omits(name)]
    convert(files, work, saver="hf", saver_options={"template": source}, **tower.stated)
    return wrong + differences(_in_fp32(source), _in_fp32(work))


def _in_fp32(source: Path) -> dict[str, dict[str, Leaf]]:
    """A tower's tensors as the tools see them; without the constants in a RADIO file that are no weights."""
    found = load_file(source / TENSORS)
    names = {name.removeprefix("vision_tower.").removeprefix("vision_model."): name for name in found}
    kept = sorted(name for name in names if not name.startswith("input_conditioner") and name != "summary_idxs")
    return {"hf": {name: leaf(found[names[name]].float()) for name in kept}}


# language models


def language_checks(folder: Path) -> Iterator[tuple[str, str, Check]]:
    for case in sorted(folder.glob("lm_*/tp*")):
        title = f"{case.parent.name}/{case.name}"
        yield title, "from src", partial(language_from, case.parent / "src", case)
        for other in sorted(case.parent.glob("tp*")):
            if other != case:
                yield title, f"from {other.name}", partial(language_from, other / "out", case)
        yield title, "back to src", partial(language_back, case)


def language_from(source: Path, case: Path, work: Path) -> list[str]:
    convert(source, work, saver="mcore", tp=tp_of(case), vocab_divisor=1, saver_options=CORE | impl_of(case))
    return against(case, work)


def language_back(case: Path, work: Path) -> list[str]:
    source = case.parent / "src"
    convert(case / "out", work, saver="hf", loader_options={"config": source}, saver_options={"template": source})
    return differences(hf(source), hf(work))


# language model and tower combined


def combined_checks(folder: Path) -> Iterator[tuple[str, str, Check]]:
    for name, (language, vision) in COMBINED.items():
        if not (folder / name).is_dir():
            continue
        yield name, "from their Hugging Face folders", partial(combined, folder, name, hugging_face=True)
        if (folder / name / "out").is_dir():
            yield name, f"from {language} and {vision}", partial(combined, folder, name, hugging_face=False)
            for part in ("lm", "vision"):
                yield name, f"its {part} taken out", partial(taken_out, folder, name, part)


def _parts(folder: Path, name: str) -> tuple[Path, Path, Tower]:
    language, vision = (folder / part for part in COMBINED[name])
    return language, vision, TOWERS[vision.parent.name]


def combined(folder: Path, name: str, work: Path, *, hugging_face: bool) -> list[str]:
    """From Hugging Face, the tower is made fp32 as its own tool makes it."""
    language, vision, tower = _parts(folder, name)
    layout = layout_from({"tp": tp_of(language)}, None)
    lm = ckptconv.Job(language / "out", saver="mcore", layout=layout, vocab_divisor=1, saver_options=CORE)
    other = ckptconv.Job(vision / "out", **tower.stated)
    if hugging_face:
        lm = replace(lm, source=language.parent / "src")
        other = ckptconv.Job(folder / tower.source, family=tower.family)
    execute(prepare_combine(lm, other, dtypes={"vision": "fp32"}).plan, work, QUICK)
    return against(folder / name, work)


def taken_out(folder: Path, name: str, part: str, work: Path) -> list[str]:
    """A part of the official model is what went into it."""
    language, vision, tower = _parts(folder, name)
    job = ckptconv.Job(
        folder / name / "out", saver="mcore", layout=layout_from({"tp": tp_of(language)}, None), vocab_divisor=1,
        loader_options={"vision_heads": tower.heads}, saver_options=CORE,
    )  # fmt: skip
    execute(prepare_extract(job, part).plan, work, QUICK)
    return against(language if part == "lm" else vision, work)


# stages of a combined model


def stage_checks(folder: Path) -> Iterator[tuple[str, str, Check]]:
    for name in STAGES:
        if (folder / "pp" / name).is_dir():
            lost = ", with the norm that the tool loses" if name.endswith("BUG") else ""
            yield f"pp/{name}", f"from {STAGES[name][0]}{lost}", partial(staged, folder / "pp", name)


def staged(folder: Path, name: str, work: Path) -> list[str]:
    source, pp, layers = STAGES[name]
    start = folder / WHOLE
    if source == CUT:
        start = files_of(folder / CUT, partial(staged, folder, CUT), work.with_name("cut"))
    wishes = {"loader_options": {"vision_heads": 25}, "saver_options": CORE, "vocab_divisor": 1}
    convert(start, work, saver="mcore", tp=2, pp=pp, pp_layers=layers, **wishes)
    ours = ranks(work)
    if not name.endswith("BUG"):
        return differences(official(folder / name), ours)
    wrong = differences(ranks(folder / WHOLE), ours)  # what was cut is back, all of it
    for held in ours.values():
        held.pop(LOST)
    return wrong + differences(official(folder / name), ours)


# a whole model as training leaves it


def llava_checks(folder: Path) -> Iterator[tuple[str, str, Check]]:
    llava = folder / "llava_siglip"
    if llava.is_dir():
        yield "llava_siglip/to_mcore_tp1", "from src, whose args say what it is", partial(llava_at_tp1, llava)
        yield "llava_siglip/to_hf", "from src, but for what the tool makes fp32", partial(llava_to_hf, llava)


def llava_at_tp1(folder: Path, work: Path) -> list[str]:
    convert(folder / "src", work, saver="mcore", tp=1, saver_options={"mcore_version": "0.14"}, vocab_divisor=1)
    return against(folder / "to_mcore_tp1", work)


def llava_to_hf(folder: Path, work: Path) -> list[str]:
    """The official file has names of no Hugging Face class; part by part it is what ours are."""
    theirs = torch.load(folder / "to_hf/out/pytorch_model.bin", weights_only=True)
    work.mkdir()
    ours = _part(folder, work / "lm", "qwen2", "language_model.")
    ours |= _part(folder, work / "vision", "siglip", "vision_model.vision_model.")
    whole = ckptconv.load(folder / "src").tensors
    for name, atom in PROJECTOR.items():
        ours[name] = torch.from_numpy(whole[ckptconv.Key(f"projector.{atom}")].numpy().astype("float32")).bfloat16()
    upcast = {name for name in ours if name.startswith("language_model.") and name.endswith(UPCAST)}
    found = {name: tensor.float() if name in upcast else tensor for name, tensor in ours.items()}
    return differences(*({"hf": {name: leaf(held[name]) for name in sorted(held)}} for held in (theirs, found)))


def _part(folder: Path, work: Path, family: str, prefix: str) -> dict[str, torch.Tensor]:
    """A part as a Hugging Face folder, under the official file's names."""
    job = ckptconv.Job(folder / "src", saver="hf", family=family, saver_options={"config_from_args": True})
    execute(prepare_extract(job, work.name).plan, work, QUICK)
    found = load_file(work / TENSORS)
    return {prefix + name.removeprefix("vision_model."): tensor for name, tensor in found.items()}


def checks(folder: Path) -> Iterator[tuple[str, str, Check]]:
    """(case, what is compared, the comparison)."""
    for part in (tower_checks, language_checks, combined_checks, stage_checks, llava_checks):
        yield from part(folder)


def main() -> int:
    asked = arguments(__doc__)
    passed, failed = print_table(checks(asked.folder), asked.only)
    print(f"\n{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
