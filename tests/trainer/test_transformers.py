"""Against transformers: the same logits from what the trainer saved, and the same losses from its model trained by torch's AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import ckptconv
from ckptconv.trainer import checkpoint, data
from ckptconv.trainer.config import Config
from ckptconv.trainer.launch import launch
from ckptconv.trainer.run import Run, train
from tests.trainer.runs import DENSE, EXPERTS, STEPS, TIED, curve

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
LAYOUTS: dict[str, tuple[Config, dict[str, int]]] = {
    "dense": (DENSE, {"tp": 2, "pp": 2}),
    "tied": (TIED, {"pp": 2, "vpp": 2}),
    "experts": (EXPERTS, {"tp": 2, "ep": 2}),
}

FAMILIES = {"dense": "hf-llama", "tied": "hf-qwen2", "experts": "hf-mixtral"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model trained a while, in rank files for ckptconv and as torch_dist, which the trainer takes up on one process."""
    folder = tmp_path_factory.mktemp("transformers")

    def job() -> None:
        for name, (config, layout) in LAYOUTS.items():
            for kind in ("torch", "torch_dist"):
                train(config.at(**layout).but(format=kind, precision="fp32"), save=folder / name / kind)

    launch(4, job)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_of_a_converted_checkpoint_are_the_trainers(name: str, folder: Path) -> None:
    config = LAYOUTS[name][0].but(precision="fp32")
    ids = data.batch(config, range(4))["tokens"]

    def logits() -> Any:
        run = Run(config)
        checkpoint.load(run, folder / name / "torch_dist")
        with torch.no_grad():
            return run.chunks[0](None, {"tokens": ids}).transpose(0, 1).numpy()

    with torch.no_grad():
        found = converted(folder / name / "torch", folder / name / "hf")(ids).logits.numpy()
    np.testing.assert_allclose(found, launch(1, logits)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_transformers_model_trained_by_torch_has_the_same_losses(name: str, tmp_path: Path) -> None:
    """Both in float64 from the same start: gradients, clipping, decay, schedule and Adam are torch's there and ours here."""
    config = LAYOUTS[name][0].but(distributed_optimizer=True, warmup=100)
    launch(1, lambda: train(config.but(steps=0), save=tmp_path / name))
    model = converted(tmp_path / name, tmp_path / "hf").double()
    ours = [loss for loss, _ in launch(2, lambda: curve(config.at(pp=2)))[0]]
    np.testing.assert_allclose(trained(model, config), ours, rtol=0, atol=1e-6)


def converted(source: Path, into: Path) -> Any:
    family = FAMILIES[source.parent.name if source.name == "torch" else source.name]
    ckptconv.convert(
        source, into, saver="hf", optimizer="drop", family=family, saver_options={"config_from_args": True}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(into, dtype=torch.float32)
    model.set_experts_implementation("eager")  # the others know no float64
    return model.train()


def trained(model: Any, config: Config) -> list[float]:
    t = config.training
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": t.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(t.beta1, t.beta2), eps=t.eps)
    losses = []
    for step in range(STEPS):
        batch = data.batch(config, range(step * t.global_batch, (step + 1) * t.global_batch))
        for group in adam.param_groups:
            group["lr"] = t.lr * step * t.global_batch / t.warmup
        logits = model(batch["tokens"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip)
        adam.step()
        losses.append(loss.item())
    return losses
