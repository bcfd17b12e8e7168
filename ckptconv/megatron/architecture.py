"""The architecture of a Megatron checkpoint from what states it: a config given, `hf/` beside it, or args; checked against the tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ckptconv.config import ModelConfig, Rope
from ckptconv.errors import ConfigError
from ckptconv.megatron.args_read import Statement
from ckptconv.megatron.measure import Measured, conflicts

GENERIC = "megatron"
ADVICE = "Say what is right with --loader.config HF_DIR (or its config.json)."
_NAMES = {f.name for f in fields(ModelConfig)}
# a difference in these changes which tensors there are, how their rows are read or what is computed: hf/ and args must agree
_STRUCTURE = (
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "head_dim",
    "experts",
    "moe_layers",
    "glu",
    "activation",
    "qk_norm",
    "norm",
    "router_pre_softmax",
)
# a difference in these is expected: official converters write Megatron's defaults for every model
_SETTINGS = ("rope", "norm_eps", "max_positions", "tied", "router_topk", "sliding_window")


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that may state the architecture. `given`: the config was named on the command line and so overrides what is said."""

    measured: Measured
    said: Statement | None = None
    config: ModelConfig | None = None
    config_where: str = ""
    given: bool = False
    family: str | None = None
    vocab: int | None = None


def resolve(evidence: Evidence) -> tuple[ModelConfig, tuple[str, ...]]:
    """The one architecture all evidence agrees on, with notes on what was overruled; or an error listing the contradictions."""
    said = evidence.said or Statement("", {})
    notes: tuple[str, ...] = ()
    if evidence.config is not None:
        config, label = evidence.config, evidence.config_where
        notes = _compare(config, said, evidence)
    else:
        config, label = _from_statement(said, evidence), said.where
    rows = evidence.measured.rows
    problems = conflicts(config, evidence.measured, label)
    if said.rows not in (None, rows):
        problems.append(f"padded_vocab_size: {said.where} says {said.rows}, the embedding has {rows} rows")
    vocab, overruled = _vocabulary(evidence, config, rows)
    if vocab is not None and vocab > rows:
        problems.append(
            f"vocabulary: {vocab} does not fit the embedding's {rows} rows (--vocab-size states the true size)"
        )
    if problems:
        raise ConfigError("\n  ".join(["the stated architecture contradicts the tensors:", *problems, ADVICE]))
    config = replace(config, vocab_rows=rows, vocab=vocab)
    if config.learned_positions and evidence.measured.padded_positions:
        config = replace(config, max_positions=evidence.measured.padded_positions)
    config.check()
    return config, (*notes, *overruled)


def _vocabulary(evidence: Evidence, config: ModelConfig, rows: int) -> tuple[int | None, tuple[str, ...]]:
    """The true size: as asked for, as the config says, or as args say; args also where a config in `hf/` is of a larger one."""
    if evidence.vocab is not None:
        return evidence.vocab, ()
    source = evidence.said or Statement("", {})
    said = _possible(source.vocab, rows)
    if evidence.config is None:
        return said, ()
    stated = config.vocab or config.vocab_rows
    if stated > rows and said is not None and not evidence.given:
        return said, (
            f"vocabulary: {evidence.config_where} says {stated}, more than {rows} rows; {said} taken from {source.where}",
        )
    return stated, ()


def _possible(vocab: object, rows: int) -> int | None:
    """A size that the embedding can have."""
    return vocab if isinstance(vocab, int) and not isinstance(vocab, bool) and 1 <= vocab <= rows else None


def _compare(config: ModelConfig, said: Statement, evidence: Evidence) -> tuple[str, ...]:
    """A Hugging Face config beside args: structure must agree unless the config was given on purpose; settings are the config's."""
    notes, problems = [], []
    for name in (*_STRUCTURE, *_SETTINGS):
        if name not in said.fields or said.fields[name] == getattr(config, name):
            continue
        ours, theirs = _show(getattr(config, name)), _show(said.fields[name])
        line = f"{name}: {said.where} says {theirs}, {evidence.config_where} says {ours}"
        if name in _STRUCTURE and not evidence.given and not (name == "activation" and config.activation in _GELUS):
            problems.append(line)
        else:
            notes.append(f"{line}; taken from the latter")
    if problems:
        raise ConfigError("\n  ".join(["two descriptions of the model contradict each other:", *problems, ADVICE]))
    return tuple(notes)


_GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def _show(value: object) -> str:
    if isinstance(value, Rope):
        scaling = f", scaling {value.kind}" if value.scaling else ""
        return f"base {value.base:g}" + (f", {value.percent:g} of a head" if value.percent != 1 else "") + scaling
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _from_statement(said: Statement, evidence: Evidence) -> ModelConfig:
    """A config from what is said, completed by what can be measured. Heads and groups cannot, and are never guessed."""
    measured = evidence.measured
    known = {k: v for k, v in measured.facts.items() if k in _NAMES} | dict(said.fields)
    heads, q_size = known.get("heads"), measured.q_size
    if "head_dim" not in known and isinstance(heads, int) and q_size and q_size % heads == 0:
        known["head_dim"] = q_size // heads
    if "kv_heads" not in known and q_size and measured.qkv_size == 3 * q_size and heads:
        known["kv_heads"] = heads  # as many key rows as query rows: no groups
    if known.get("experts") and "ffn" not in known:
        known["ffn"] = known.get("moe_ffn", 0)
    if "tied" not in known and not measured.has_head:
        known["tied"] = True
    if not known.get("learned_positions") and "rope" not in known:
        known["rope"] = None
    absent = [name for name in _REQUIRED if known.get(name) is None]
    if known.get("learned_positions"):
        known["rope"] = None
    elif known.get("rope") is None:
        absent.append("position embedding (rope or learned)")
    if absent:
        who = (
            f"{said.where} do not say"
            if evidence.said is not None
            else "there are no args in the files, and nothing else says"
        )
        raise ConfigError(f"{who}: {', '.join(absent)}. {ADVICE}")
    known |= {"family": evidence.family or GENERIC, "vocab_rows": measured.rows}
    known.setdefault("moe_ffn", 0)
    known.setdefault("activation", "silu" if known.get("glu") else "gelu")
    return ModelConfig(**known)  # type: ignore[arg-type]


_REQUIRED = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "norm_eps", "tied")
