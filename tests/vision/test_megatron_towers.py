"""Towers that lie in Megatron's files: what the config beside them says, and the way back to what they were made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptconv import ExecuteOptions, Job, convert
from ckptconv.combine import prepare_combine, prepare_extract
from ckptconv.errors import ConfigError
from ckptconv.executor.execute import execute
from ckptconv.testing.models import make_hf, make_tower
from tests.vision.arrays import atoms, config_json, same

QUICK = ExecuteOptions(durable=False)


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_whole_models_of_clip_and_siglip_come_back_from_megatron(kind: str, tmp_path: Path) -> None:
    """Their config.json, which lies beside the tower, has the tower's in a section: heads are no class's default."""
    source = make_tower(tmp_path / "hf", kind)
    convert(source, tmp_path / "tower", saver="hf", execute_options=QUICK)
    convert(source, tmp_path / "tp4", saver="mcore", tp=4, execute_options=QUICK)
    convert(tmp_path / "tp4", tmp_path / "tp2", tp=2, execute_options=QUICK)
    donor = {"template": str(source)}
    convert(tmp_path / "tp2", tmp_path / "back", saver="hf", saver_options=donor, execute_options=QUICK)
    same(atoms(tmp_path / "tower"), atoms(tmp_path / "back"))
    assert config_json(tmp_path / "back") == config_json(tmp_path / "tower")


def test_heads_of_an_option_and_of_a_config_must_agree(tmp_path: Path) -> None:
    """The config decides how q, k and v are cut: an option that is not heeded would be worse than none."""
    convert(make_tower(tmp_path / "hf", "CLIPModel"), tmp_path / "tp2", saver="mcore", tp=2, execute_options=QUICK)
    with pytest.raises(ConfigError, match=r"--loader\.vision-heads 2, but the config .* says 4 attention heads"):
        convert(tmp_path / "tp2", tmp_path / "out", tp=1, loader_options={"vision-heads": 2})
    stated = {"vision-heads": 4, "config": str(tmp_path / "hf")}
    convert(tmp_path / "tp2", tmp_path / "out", tp=1, loader_options=stated, execute_options=QUICK)


@pytest.mark.parametrize("saver", ["mcore", "mcore-dist"])
@pytest.mark.parametrize("kind", ["CLIPVisionModelWithProjection", "SiglipVisionModel", "CLIPModel", "SiglipModel"])
def test_a_tower_taken_out_gets_back_what_megatron_has_no_place_for(kind: str, saver: str, tmp_path: Path) -> None:
    """CLIP's last norm and projection, SigLIP's pooling head: as for a tower that was alone before, in Megatron's files too."""
    language, source = make_hf(tmp_path / "lm", "llama"), make_tower(tmp_path / "vision", kind)
    convert(source, tmp_path / "tp2", saver="mcore", tp=2, execute_options=QUICK)
    joined = prepare_combine(Job(language, saver=saver), Job(tmp_path / "tp2"), kind="llava", init_projector="zeros")
    execute(joined.plan, tmp_path / "whole", QUICK)
    alone = Job(tmp_path / "whole", saver="hf", saver_options={"template": source})
    execute(prepare_extract(alone, "vision").plan, tmp_path / "back", QUICK)
    same(atoms(source), atoms(tmp_path / "back"))
