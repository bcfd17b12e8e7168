"""The command line as a contract: commands, options, streams, exit codes, help. What each option does: test_options.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import ckptconv
from ckptconv.cli.commands import cli
from ckptconv.cli.progress import Bar, Lines, progress
from ckptconv.errors import UsageError
from ckptconv.sizes import human, parse_size
from tests.cli.helpers.console import Console

LAYOUT = "--tp --pp --vpp --ep --etp --pp-layers"
SOURCE = "--loader --family --vocab-size --mapping --drop --iteration --check"
CHANGE = "--dtype --make-vocab-size-divisible-by --optimizer --replicas --tokenizer --mcore-version"
RUN = "--memory --workers --force --allow-overflow"
OUTPUT = "--json --quiet"
COMMANDS = {
    "convert": f"--saver --dry-run {LAYOUT} {SOURCE} {CHANGE} {RUN} {OUTPUT}",
    "reshard": f"--dry-run {LAYOUT} {SOURCE} {CHANGE} {RUN} {OUTPUT}",
    "upgrade": f"--dry-run {SOURCE} {CHANGE} {RUN} {OUTPUT}",
    "plan": "",
    "plan convert": f"--saver {LAYOUT} {SOURCE} {CHANGE} {RUN} {OUTPUT}",
    "plan reshard": f"{LAYOUT} {SOURCE} {CHANGE} {RUN} {OUTPUT}",
    "combine": "--saver --projector --init-projector --vocab-rows --init "
    "--as --replace --lm.dtype --vision.dtype --projector.dtype --loader-vision --loader-projector --family-vision "
    f"--dry-run {LAYOUT} {SOURCE} {CHANGE} {RUN} {OUTPUT}",
    "extract": f"--part --saver --dry-run {LAYOUT} {SOURCE} {CHANGE} {RUN} {OUTPUT}",
    "inspect": f"--tensors --json {SOURCE}",
    "verify": f"--loader-a --loader-b {SOURCE} {OUTPUT}",
    "formats": "--json",
    "families": "--json",
    "tokenizer": "",
    "tokenizer add-tokens": "--tokens-file --control --checkpoint --vocab-rows --init --vocab-size --memory --force "
    + OUTPUT,
    "demo": "",
}


def commands(group: click.Group = cli, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield prefix + name, command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} ")


def shell(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program as users start it."""
    return subprocess.run(
        [sys.executable, "-m", "ckptconv", *map(str, args)],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_commands_are_those_of_the_contract() -> None:
    assert {name for name, _ in commands()} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_those_of_the_contract(name: str) -> None:
    command = dict(commands())[name]
    options = {flag for p in command.params if isinstance(p, click.Option) for flag in p.opts}
    assert options == set(COMMANDS[name].split())


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_has_an_example_of_the_very_command(name: str, console: Console) -> None:
    out = console(*name.split(), "--help").out
    assert out == console(*name.split(), "-h").out
    assert f"ckptconv {name}".rstrip() + " " in out.partition("Examples:")[2].replace("\n", " ")
    assert out.isascii(), "help must print on any terminal"


def test_python_m_is_the_command() -> None:
    done = shell("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"{ckptconv.__version__}\n")


def test_results_on_stdout_messages_on_stderr(models: Path, tmp_path: Path) -> None:
    done = shell("convert", models / "llama", tmp_path / "out", "--saver", "mcore", "--tp", "2")
    assert done.returncode == 0
    assert done.stdout.startswith("Megatron-LM flags (pretrain_gpt.py):\n")
    assert f"--load {tmp_path / 'out'} " in done.stdout
    assert "written in" in done.stderr
    assert "peak memory" in done.stderr
    assert "written in" not in done.stdout


def test_quiet_is_silent_but_for_the_result(console: Console, models: Path, tmp_path: Path) -> None:
    ran = console("convert", models / "m22", tmp_path / "out", "--saver", "hf", "--quiet")
    assert ran.err == ""
    assert "AutoModelForCausalLM.from_pretrained" in ran.out
    assert console("verify", models / "m22", tmp_path / "out", "--quiet").err == ""


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_a_terminal_gets_a_bar_and_no_colour(models: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    reader, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (25, 80))
    args = [
        sys.executable,
        "-m",
        "ckptconv",
        "convert",
        str(models / "llama"),
        str(tmp_path / "out"),
        "--saver",
        "mcore",
    ]
    with subprocess.Popen(args, stderr=terminal, stdout=terminal, env={**os.environ, **environment}) as child:
        os.close(terminal)
        told = b""
        try:
            while block := os.read(reader, 65536):
                told += block
        except OSError:
            pass  # the other end is closed
    os.close(reader)
    assert child.returncode == 0
    assert b"100%" in told
    assert b"B/s" in told
    assert b"\x1b[" not in told


def test_progress_elsewhere_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(every=0)
    lines.start(4_000_000)
    lines.advance(1_000_000)
    lines.done()
    ran = capsys.readouterr()
    assert ran.out == ""
    assert ran.err.startswith("1.00 MB of 4.00 MB, ")
    assert ran.err.endswith(" s left\n")
    assert isinstance(progress(quiet=False), Lines | Bar)
    assert progress(quiet=True) is None


def test_sizes_are_decimal(console: Console, models: Path, tmp_path: Path) -> None:
    assert (parse_size("1GB", "--memory"), parse_size("1.5 mb", "--memory")) == (10**9, 1_500_000)
    assert human(82_112) == "82.11 kB"
    for wrong in ("1GiB", "much", "-1GB", "0"):
        with pytest.raises(UsageError, match="--memory"):
            parse_size(wrong, "--memory")
    src, out = models / "llama", tmp_path / "out"
    ran = console("convert", src, out, "--saver", "mcore", "--memory", "1GiB", code=2)
    assert ran.err == "ckptconv: error: --memory 1GiB: expected a number and one of KB, MB, GB, TB, such as 5GB\n"
    ran = console("convert", src, out, "--saver", "mcore", "--memory", "40MB", code=1)
    assert "a memory bound of 40,000,000 bytes is too small" in ran.err
    assert not out.exists()
    console("convert", src, out, "--saver", "mcore", "--memory", "0.06GB", "--workers", "2")


USAGE = {
    "no saver": ("convert", "SRC", "out"),
    "no such saver": ("convert", "SRC", "out", "--saver", "gguf"),
    "no such loader": ("convert", "SRC", "out", "--saver", "hf", "--loader", "gguf"),
    "no such option": ("convert", "SRC", "out", "--saver", "hf", "--colour"),
    "option of another format": ("convert", "SRC", "out", "--saver", "hf", "--saver.experts", "grouped"),
    "option without its value": ("convert", "SRC", "out", "--saver", "mcore", "--saver.experts"),
    "degree": ("convert", "SRC", "out", "--saver", "mcore", "--tp", "two"),
    "degree 0": ("convert", "SRC", "out", "--saver", "mcore", "--tp", "0"),
    "three degrees": ("convert", "SRC", "out", "--saver", "mcore", "--tp", "1:2:4"),
    "layers": ("convert", "SRC", "out", "--saver", "mcore", "--pp", "2", "--pp-layers", "two,two"),
    "dtype": ("convert", "SRC", "out", "--saver", "hf", "--dtype", "int8"),
    "optimizer": ("convert", "SRC", "out", "--saver", "hf", "--optimizer", "convert"),
    "replicas": ("convert", "SRC", "out", "--saver", "hf", "--replicas", "average"),
    "iteration": ("convert", "SRC", "out", "--saver", "hf", "--iteration", "last"),
    "saver iteration": ("convert", "SRC", "out", "--saver", "mcore", "--saver.iteration", "last"),
    "workers": ("convert", "SRC", "out", "--saver", "hf", "--workers", "0"),
    "vocabulary": ("convert", "SRC", "out", "--saver", "hf", "--vocab-size", "-1"),
    "shard size": ("convert", "SRC", "out", "--saver", "hf", "--saver.max-shard-size", "5"),
    "version": ("convert", "SRC", "out", "--saver", "mcore", "--mcore-version", "0.3"),
    "two versions": ("convert", "SRC", "out", "--saver", "mcore", "--mcore-version", "0.9", "--saver.mcore-version", "0.16"),
    "impl": ("convert", "SRC", "out", "--saver", "mcore", "--saver.transformer-impl", "te"),
    "form of experts": ("convert", "SRC", "out", "--saver", "mcore", "--saver.experts", "some"),
    "family": ("convert", "SRC", "out", "--saver", "hf", "--family", "gpt5"),
    "source is destination": ("convert", "SRC", "SRC", "--saver", "hf"),
    "destination in source": ("convert", "SRC", "SRC/out", "--saver", "hf"),
    "format": ("formats", "gguf"),
    "command": ("transmogrify",),
}  # fmt: skip


@pytest.mark.parametrize("args", USAGE.values(), ids=USAGE)
def test_usage_errors_are_2(args: tuple[str, ...], console: Console, models: Path, tmp_path: Path) -> None:
    places = {"SRC": models / "llama", "SRC/out": models / "llama" / "out", "out": tmp_path / "out"}
    if args[-1] == "5":
        args = (*args[:-1], "5 apples")
    ran = console(*(places.get(a, a) for a in args), code=2)
    assert ran.out == ""
    assert "rror: " in ran.err
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_wrong_names_are_answered_with_the_right_ones(console: Console, models: Path, tmp_path: Path) -> None:
    src, out = models / "llama", tmp_path / "out"
    ran = console("convert", src, out, "--saver", "gguf", code=2)
    assert (
        "known: hf (huggingface, transformers, llama_mistral), mcore (core, megatron-core), mcore-dist (torch_dist"
        in ran.err
    )
    ran = console("convert", src, out, "--saver", "hf", "--saver.experts", "grouped", code=2)
    assert (
        "it has: --saver.max-shard-size, --saver.template, --saver.family, --saver.image-token, --saver.prefix"
        in ran.err
    )


def test_failures_are_1_and_one_message(models: Path, tmp_path: Path) -> None:
    done = shell("convert", tmp_path / "absent", tmp_path / "out", "--saver", "hf")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"ckptconv: error: {tmp_path / 'absent'}: there is nothing here\n"


def test_a_closed_pipe_is_no_crash(models: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "ckptconv", "families", "mcore"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


def test_convert_json(console: Console, models: Path, tmp_path: Path) -> None:
    ran = console("convert", models / "mixtral", tmp_path / "out", "--saver", "mcore", "--ep", "2", "--json")
    facts = json.loads(ran.out)
    assert set(facts) == {
        "dst", "ckptconv", "source", "result", "options", "dropped", "unchecked_replicas", "notes", "usage", "report",
        "iteration", "mcore_version", "format_notes",
    }  # fmt: skip
    assert facts["result"] == {
        "format": "mcore", "mapping": "mcore", "form": ["experts_te"],
        "tp": 1, "pp": 1, "vpp": 1, "ep": 2, "etp": 1, "pp_layers": [4],
    }  # fmt: skip
    report = facts["report"]
    assert set(report) == {"bytes_written", "bytes_resumed", "seconds", "peak_memory", "tensors", "losses"}
    assert report["bytes_written"] > 270_000
    assert facts["usage"][0].startswith("Megatron-LM flags")
    console("convert", tmp_path / "out", tmp_path / "hf", "--saver", "hf", "--json", "--quiet")


def test_formats(console: Console) -> None:
    rows = json.loads(console("formats", "--json").out)
    assert [(r["name"], r["aliases"], r["origin"]) for r in rows] == [
        ("hf", ["huggingface", "transformers", "llama_mistral"], "built-in"),
        ("mcore", ["core", "megatron-core"], "built-in"),
        ("mcore-dist", ["torch_dist", "torch-dist", "zarr"], "built-in"),
        ("legacy", ["megatron"], "built-in"),
        ("nemo", ["nemo1"], "built-in"),
        ("nemo2", [], "built-in"),
        ("lightning", ["ptl"], "built-in"),
        ("openai-clip", [], "built-in"),
        ("mm-projector", [], "built-in"),
        ("dcp", ["torch-dcp", "fsdp"], "built-in"),
    ]
    assert "legacy (megatron): Megatron-LM before Megatron-Core" in console("formats").out
    out = console("formats", "mcore").out
    for line in (
        "  --loader.config  ", "  --saver.transformer-impl  ", "  --saver.experts  ",
        "  --saver.mcore-version [0.16]  ", "  --saver.te-version [2.0]  ", "  --saver.iteration  ",
    ):  # fmt: skip
        assert line in out
    facts = json.loads(console("formats", "hf", "--json").out)
    assert set(facts) == {"name", "aliases", "summary", "loader", "saver"}
    assert [(o["name"], o["default"]) for o in facts["saver"]] == [
        ("max-shard-size", "5GB"), ("template", ""), ("family", ""), ("image-token", ""), ("prefix", ""), ("config-from-args", "False"),
    ]  # fmt: skip
    assert console("formats", "megatron").out == console("formats", "legacy").out


def test_families(console: Console) -> None:
    rows = json.loads(console("families", "--json").out)
    assert {r["name"]: r["match"].get("model_type") for r in rows} == {
        "hf-clip": ["clip_vision_model", "clip"], "hf-internlm2": "internlm2", "hf-internvit": "intern_vit_6b", "hf-internvl": "internvl",
        "hf-internvl-chat": "internvl_chat", "hf-internvl-vision": "internvl_vision", "hf-llama": "llama", "hf-llava": "llava",
        "hf-llava-liuhaotian": ["llava_llama", "llava_mistral", "llava"], "hf-llava-next": "llava_next", "hf-mistral": "mistral",
        "hf-mixtral": "mixtral", "hf-nvlm": "NVLM_D", "hf-qwen2": "qwen2", "hf-qwen3": "qwen3", "hf-radio-g": None, "hf-radio-h": None,
        "hf-siglip": ["siglip_vision_model", "siglip"],
    }  # fmt: skip
    assert "hf-qwen3: config.json with model_type qwen3 [built-in]" in console("families").out
    assert console("families", "qwen3").out == console("families", "hf-qwen3").out
    assert "model.layers.{l}.self_attn.q_norm.weight" in console("families", "qwen3").out
    rules = json.loads(console("families", "mcore", "--json").out)
    assert rules["output_layer.weight"][0] == {"is": "head.weight", "when": ["!tied"], "on": ["head"], "copy": False}
    assert "    embed.weight  (when tied; on head_apart)" in console("families", "mcore").out
    assert "known: " in console("families", "nonsense", code=2).err


def test_demo(console: Console) -> None:
    out = console("demo").out
    assert out.count("$ ckptconv convert ") == 2
    assert "$ ckptconv reshard mcore-tp2pp2 mcore-tp4 --tp 2:4 --pp 2:1" in out
    assert out.count("    same (39 tensors)") == 3
    assert "mcore-tp2pp2/iter_0000001/mp_rank_01_001/model_optim_rng.pt" in out
    assert out.endswith("The weights file came back byte for byte.\n")
