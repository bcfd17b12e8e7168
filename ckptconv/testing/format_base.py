"""What an author states of a format for its contract, and how the tests are spread over models and layouts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from ckptconv.errors import CkptconvError
from ckptconv.formats import Format
from ckptconv.testing.checkpoints import MODELS, config_of
from ckptconv.testing.workbench import Bench

Degrees = dict[str, int]


class FormatBase:
    """`format` must be given; the rest says what the format can hold, and is tested to be true.

    models      names of `ckptconv.testing.checkpoints.MODELS` (or TOWERS) that the format must hold; the first is tried most
    topologies  layouts it must hold, as degrees; {} is one rank with everything. `ep` is only used for models with experts
    refuses     layouts it must refuse
    options     sets of --saver options (as typed) that must each hold every model
    to_hf       whether Hugging Face files can be made of its folders with nothing else at hand
    """

    format: ClassVar[Format]
    models: ClassVar[tuple[str, ...]] = tuple(MODELS)
    topologies: ClassVar[tuple[Degrees, ...]] = ({},)
    refuses: ClassVar[tuple[Degrees, ...]] = ({"tp": 3},)
    options: ClassVar[tuple[dict[str, object], ...]] = ({},)
    to_hf: ClassVar[bool] = True

    @pytest.fixture
    def bench(self, tmp_path: Path) -> Bench:
        return Bench(self.format, tmp_path, self.models[0])

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """`model` and `topology` are spread over what was declared, `largest` and `refused` over layouts alone."""
        wanted = metafunc.fixturenames
        if "model" in wanted and "topology" in wanted:
            metafunc.parametrize(("model", "topology"), list(self._cases()))
        elif "model" in wanted:
            metafunc.parametrize("model", self.models)
        elif "topology" in wanted:
            fitting = [t for t in self.topologies if _fits(self.models[0], t)]
            metafunc.parametrize("topology", fitting, ids=_name)
        if "refused" in wanted:
            metafunc.parametrize("refused", self.refuses, ids=_name)
        if "option" in wanted:
            metafunc.parametrize("option", self.options, ids=_name)
        if "dtype" in wanted:
            metafunc.parametrize("dtype", ["fp32", "bf16", "fp16"])

    def _cases(self) -> Iterator[object]:
        for model in self.models:
            for topology in self.topologies:
                if _fits(model, topology):
                    yield pytest.param(model, topology, id=f"{model}-{_name(topology)}")


def _fits(model: str, topology: Degrees) -> bool:
    """Experts can be dealt only where there are some; and a model whose heads do not divide is no test of a format."""
    return topology.get("ep", 1) == 1 or "num_local_experts" in config_of(model)


def _name(degrees: dict[str, object] | Degrees) -> str:
    return "".join(f"{k}{v}" for k, v in degrees.items()) or "plain"


def refusal(bench: Bench, path: Path) -> CkptconvError | None:
    """What reading a folder whole (without its payload) says of it; anything but a CkptconvError is let through."""
    try:
        bench.read(path)
    except CkptconvError as error:
        return error
    return None
