"""ModelConfig: the architecture in the project's own words: sizes of named axes, indivisible units, and tags that mappings ask for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ckptconv.dtypes import DType
from ckptconv.errors import ConfigError, MappingError


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: base, the part of a head it turns, and the scaling as Hugging Face writes it (None: none)."""

    base: float = 10000.0
    percent: float = 1.0
    scaling: dict[str, object] | None = None

    @property
    def kind(self) -> str:
        """The scaling's rope_type (`type` in older files); empty without one."""
        return str(self.scaling.get("rope_type", self.scaling.get("type"))) if self.scaling else ""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What must be known of a model to name and cut its tensors, and to write another framework's configuration.

    `vocab` is the true vocabulary (None: not known), `vocab_rows` the rows the embedding has now, padding included;
    `true_heads` and `heads` are the same of attention heads (InternViT gets dummy ones). `raw` is the source's own
    configuration, kept whole; nothing in the core reads it. What else a model has beside a language model, a vision tower
    and the projector between them, has a config of its own kind in `towers`.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_rows: int
    vocab: int | None = None
    max_positions: int = 0
    rope: Rope | None = field(default_factory=Rope)
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    activation: str = "silu"
    glu: bool = True
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    learned_positions: bool = False
    sliding_window: int | None = None
    experts: int = 0
    moe_ffn: int = 0
    router_topk: int = 0
    router_pre_softmax: bool = False
    moe_layers: tuple[int, ...] = ()
    dtype: DType | None = None
    kind: str = "text"
    final_norm: bool = True
    pre_norm: bool = False  # in front of the first layer; of a projector: of what comes in
    qk_norm_full: bool = False  # over all heads at once
    layer_scale: bool = False
    true_heads: int | None = None
    image: int = 0  # pixels along a side, and along one of a patch
    patch: int = 0
    channels: int = 3
    patch_bias: bool = False
    patch_linear: bool = False  # patches come in flat: the embedder is a matrix, no convolution
    class_tokens: int = 0
    mask_token: bool = False
    pooling: bool = False  # SigLIP's attention pooling head
    projection: int = 0  # entries of CLIP's shared space; 0: there is no projection into it
    inputs: int = 0  # of a projector: entries of what comes in
    linear: bool = False  # a projector of one layer
    newline: bool = False  # LLaVA-NeXT's learned end of a row of tiles, beside its projector
    # how a language model sees images, of the whole model; None: nothing says it
    feature_layer: int | None = None  # of the tower, for the projector; as hidden states are numbered: -1 is the last
    feature_select: str | None = None  # of its entries: "patch", or "full" with the class token
    shuffle: str | None = None  # where four patches are one: their grid lies by "rows", or by "columns"
    image_token: int | None = None  # which stands for a piece of an image
    tiling: bool | None = None  # large images are cut into tiles
    min_tiles: int | None = None
    max_tiles: int | None = None
    thumbnail: bool | None = None  # the whole image beside its tiles
    tile_tags: bool | None = None  # each tile has words in front
    image_tags: str | None = None  # whose words stand around an image: "nvlm", "internvl", or "" for none
    towers: dict[str, ModelConfig] = field(default_factory=dict)
    raw: dict[str, object] = field(default_factory=dict)

    def size(self, axis: str) -> int:
        """How many entries an axis of the vocabulary has."""
        value = getattr(self, _SIZES[axis], None) if axis in _SIZES else None
        if value is None:
            raise MappingError(f"no size is known for axis {axis!r}; known axes: {', '.join(sorted(_SIZES))}")
        return int(value)

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def patch_inputs(self) -> int:
        return self.channels * self.patch * self.patch

    @property
    def three_hidden(self) -> int:
        return 3 * self.hidden

    @property
    def one(self) -> int:
        return 1

    def has(self, tag: str, layer: int | None = None) -> bool:
        """Whether a tag holds, for the whole model or for one layer; `!tag` negates."""
        if tag.startswith("!"):
            return not self.has(tag[1:], layer)
        if tag in ("dense", "moe"):
            if layer is None:
                return bool(self.moe_layers) if tag == "moe" else len(self.moe_layers) < self.layers
            return (layer in self.moe_layers) == (tag == "moe")
        if tag == "norm_bias":
            return self.norm == "layernorm"
        if tag in KINDS:
            return self.kind == tag
        if tag in _COUNTED:
            return bool(getattr(self, _COUNTED[tag]))
        if tag in _FLAGS:
            return bool(getattr(self, tag))
        raise MappingError(f"unknown tag {tag!r}; known tags: {', '.join(sorted(TAGS))}")

    def check(self) -> None:
        """Refuse what cannot be, before anything is derived from it."""
        for name in _NEEDED[self.kind]:
            if getattr(self, name) < 1:
                raise ConfigError(f"the architecture has {name} = {getattr(self, name)}: it must be at least 1")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} attention heads cannot share {self.kv_heads} key/value heads evenly")
        if self.true_heads is not None and not 1 <= self.true_heads <= self.heads:
            raise ConfigError(f"{self.true_heads} true attention heads cannot be among {self.heads}")
        if self.vocab is not None and not 1 <= self.vocab <= self.vocab_rows:
            raise ConfigError(f"vocabulary size {self.vocab} does not fit an embedding of {self.vocab_rows} rows")
        if self.moe_layers and not (self.experts and self.moe_ffn):
            raise ConfigError(f"layers {self.moe_layers} have experts, but their number or size is not stated")
        for tower in self.towers.values():
            tower.check()


COMPUTED = ("feature_layer", "feature_select", "shuffle")  # what the model makes of an image that it is given
# and how it is given one
SHOWN = ("image_token", "tiling", "min_tiles", "max_tiles", "thumbnail", "tile_tags", "image_tags")
SIGHT = (*COMPUTED, *SHOWN)
TOWERS = ("vision", "projector")  # parts of a larger model, whose atoms begin with their names; also kinds of models
KINDS = ("text", *TOWERS)
_ATTENTION = ("layers", "hidden", "heads", "kv_heads", "head_dim")
_NEEDED = {
    "text": (*_ATTENTION, "vocab_rows"),
    "vision": (*_ATTENTION, "patch", "channels"),
    "projector": ("hidden", "inputs"),
}
_COUNTED = {"class_token": "class_tokens", "projected": "projection"}  # tag -> the field that counts what it asks for

# axis of the vocabulary -> field or property of ModelConfig; canonical.toml may name these and no others
_SIZES = {
    "vocab": "vocab_rows",
    "hidden": "hidden",
    "q": "q_size",
    "kv": "kv_size",
    "head_dim": "head_dim",
    "ffn": "ffn",
    "moe_ffn": "moe_ffn",
    "experts": "experts",
    "positions": "max_positions",
    "one": "one",
    "class_tokens": "class_tokens",
    "channels": "channels",
    "patch": "patch",
    "patch_inputs": "patch_inputs",
    "patch_rows": "hidden",
    "three_hidden": "three_hidden",
    "projection": "projection",
    "inputs": "inputs",
}
_UNITS = {"q": "heads", "kv": "kv_heads"}
_FLAGS = {f.name for f in fields(ModelConfig) if f.type == "bool"}
TAGS = frozenset({*_FLAGS, *KINDS, *_COUNTED, "dense", "moe", "norm_bias"})
AXES = frozenset(_SIZES)


def part_of(config: ModelConfig, atom: str) -> ModelConfig:
    """The config that an atom's sizes are of: its tower's, or the model's own."""
    return config.towers.get(atom.partition(".")[0], config)


def units(config: ModelConfig, axis: str) -> int:
    """How many indivisible units an axis has: heads for q, key/value heads for kv, else its size."""
    return int(getattr(config, _UNITS[axis])) if axis in _UNITS else config.size(axis)


def projector_config(
    inputs: int,
    ffn: int,
    hidden: int,
    *,
    pre_norm: bool = False,
    norm: str = "layernorm",
    mlp_bias: bool = False,
    activation: str = "gelu",
) -> ModelConfig:
    """A projector of two layers from `inputs` entries through `ffn` to `hidden`; the norm, if any, is of what comes in."""
    return ModelConfig(
        "projector", 0, hidden, 0, 0, 0, ffn, 0, kind="projector", inputs=inputs, pre_norm=pre_norm, norm=norm, mlp_bias=mlp_bias,
        activation=activation, glu=False, final_norm=False, rope=None,
    )  # fmt: skip
