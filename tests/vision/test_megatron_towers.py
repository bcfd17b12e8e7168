"""Towers that lie in Megatron's files: what the config beside them says, and the way back to what they were made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptconv import ExecuteOptions, convert
from ckptconv.errors import ConfigError
from ckptconv.testing.models import make_tower
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
