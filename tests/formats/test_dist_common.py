"""The state that all processes share: `common.pt`, and the object that took its place in Megatron-Core 0.19.

No package of 0.19 is to be had for this Python, so a real checkpoint of 0.16.1 is given its form, which was read in the source.
"""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

import ckptconv
from ckptconv.errors import FormatError
from ckptconv.inspection import inspect
from ckptconv.pipeline import Job

SAVED = Path(__file__).parents[1] / "golden" / "mcore" / "llama_tp2pp2" / "ckpt"
KEY = "common_state/shard_0_1"


def with_object(value: object, base: Path) -> Path:
    """The real checkpoint, `value` in place of what `common.pt` holds."""
    folder = Path(shutil.copytree(SAVED, base)) / "iter_0000007"
    told = FileSystemReader(folder).read_metadata()
    blob = io.BytesIO()
    torch.save(value, blob)
    (folder / "__9_0.distcp").write_bytes(blob.getvalue())
    told.state_dict_metadata[KEY] = BytesStorageMetadata()
    told.storage_data[MetadataIndex(KEY)] = _StorageInfo("__9_0.distcp", 0, len(blob.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(told))
    (folder / "common.pt").unlink()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / "integrity.json").write_text('{"algorithm": "sha256", "files": {}}')
    return base


def test_object_says_what_the_file_said(tmp_path: Path) -> None:
    common = torch.load(SAVED / "iter_0000007" / "common.pt", weights_only=False)
    base = with_object([common], tmp_path / "new")
    old, new = ckptconv.load(SAVED), ckptconv.load(base)
    assert new.extras.objects == old.extras.objects
    assert new.extras.notes == tuple(n.replace("common.pt", "common_state/shard_0_1") for n in old.extras.notes)
    assert new.config == old.config
    assert ckptconv.verify(SAVED, base).same
    facts, problem = inspect(Job(base))
    assert problem is None
    assert facts["storage"]["unused"] == []  # type: ignore[index]


@pytest.mark.parametrize("value", [[], [1, 2], "text"])
def test_object_of_another_form_is_refused(value: object, tmp_path: Path) -> None:
    base = with_object(value, tmp_path / "new")
    with pytest.raises(FormatError, match=rf"{KEY}: holds a (list|str), expected a dictionary"):
        ckptconv.load(base)
