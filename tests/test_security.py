"""What is read from disk is data: no pickle is opened, no code of a model is run, and dependencies are pinned by hash."""

from __future__ import annotations

import ast
import json
import pickle
import subprocess
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from fastencoder.cli import app
from tools import audit

ROOT = Path(__file__).parents[1]
# Every command that reads a model.
COMMANDS = {
    "explain": (),
    "verify": (),
    "bench": ("--lengths", "4,9"),
    "compile": ("--arch", "sm_90", "--out", "{out}"),
}
each_command = pytest.mark.parametrize("command", COMMANDS)


def ask(command: str, folder: Path) -> tuple[int, list[str]]:
    """The exit status, and the lines of standard error."""
    options = [option.format(out=folder / "out") for option in COMMANDS[command]]
    result = CliRunner().invoke(app, [command, str(folder), *options])
    return result.exit_code, result.stderr.splitlines()


class Harm:
    """What a pickle can do: this one writes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return open, (str(self.marker), "w")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48).save_pretrained(
        tmp_path
    )
    return tmp_path


@each_command
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.ckpt"])
def test_weights_that_are_a_pickle_are_refused_in_one_line(folder: Path, command: str, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Harm(folder / "ran")))
    status, said = ask(command, folder)
    assert status == 2 and len(said) == 1
    assert name in said[0] and "safetensors" in said[0]
    assert not (folder / "ran").exists()
    pickle.loads((folder / name).read_bytes()).close()
    assert (folder / "ran").exists()  # reading it would have done harm


def test_a_pickle_beside_safetensors_is_not_looked_at(folder: Path) -> None:
    BertModel(BertConfig.from_pretrained(folder)).save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(folder / "ran")))
    assert ask("explain", folder)[0] == 0
    assert not (folder / "ran").exists()


@each_command
@pytest.mark.parametrize("model_type", ["own-model", None])
def test_a_models_own_code_is_refused_and_not_run(folder: Path, command: str, model_type: str | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    code = f"open({str(folder / 'ran')!r}, 'w').close()\n"
    (folder / "own.py").write_text(f"{code}class OwnConfig:\n    pass\nclass OwnModel:\n    pass\n")
    status, said = ask(command, folder)
    assert status == 2 and len(said) == 1 and "config.json" in said[0]
    assert not (folder / "ran").exists()


def test_nothing_in_the_package_opens_pickles_or_trusts_code() -> None:
    """Every call that could is looked at, by its name; `trust_remote_code` is given, and is False, where a model is loaded."""
    found, loaded = [], 0
    for path in [*ROOT.glob("fastencoder/**/*.py"), *ROOT.glob("examples/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            trusts = given.get("trust_remote_code", ast.Constant(False))
            unsafe = name.endswith(("pickle.load", "pickle.loads", "torch.load", "joblib.load", "exec", "eval_str"))
            if unsafe or name == "eval" or not (isinstance(trusts, ast.Constant) and trusts.value is False):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
            if name.endswith("from_pretrained") and path.is_relative_to(ROOT / "fastencoder"):
                loaded += 1
                assert "trust_remote_code" in given, f"{path.relative_to(ROOT)}:{node.lineno}"
                weights = "Tokenizer" not in name and "Config" not in name
                assert not weights or ast.unparse(given.get("use_safetensors", node)) == "True", f"{path}:{node.lineno}"
    assert not found and loaded >= 4


# ------------------------------------------------------------------------------------------------------------- dependencies


def test_the_lock_pins_everything_by_hash_and_names_no_place() -> None:
    text = audit.LOCK.read_text()
    pinned = audit.read_lock(text, audit.required())
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert {"torch", "transformers", "triton", "safetensors", "tokenizers"} <= set(pinned)
    assert not [word for word in ("://", "index-url", "find-links", "trusted-host", "file:", "/") if word in text]


GOOD = "a==1.0 \\\n    --hash=sha256:" + "0" * 64 + "\nb==2.0+cpu --hash=sha256:" + "f" * 64 + "\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD.replace("==1.0", ">=1.0"), "exact version"),
        (GOOD.replace("f" * 64, "f" * 63), "b has no sha256"),
        (GOOD + "c @ https://somewhere/c.whl\n", "exact version"),
        ("--index" + "-url https://somewhere\n" + GOOD, "exact version"),
        (GOOD.replace("b==", "c=="), "b: required"),
    ],
)
def test_what_is_no_lock(text: str, said: str) -> None:
    assert audit.read_lock(GOOD, {"a", "b"}) == {"a": "1.0", "b": "2.0+cpu"}
    with pytest.raises(audit.LockError, match=said):
        audit.read_lock(text, {"a", "b"})


def answering(stdout: object = "", stderr: str = "", status: int = 0) -> audit.Run:
    text = stdout if isinstance(stdout, str) else json.dumps(stdout)
    return lambda command: subprocess.CompletedProcess(command, status, text, stderr)


def known(**vulnerable: list) -> dict:
    names = {"a": "1.0", "b": "2.0"}
    return {"dependencies": [{"name": name, "version": names[name], "vulns": vulnerable[name]} for name in vulnerable]}


PINNED = {"a": "1.0", "b": "2.0+cpu"}
PROBLEM = {"id": "PYSEC-1", "fix_versions": ["1.1"]}


def test_an_audit_says_what_it_found(capsys) -> None:
    assert audit.audit(PINNED, answering(known(a=[], b=[]))) == 0
    assert "2 of 2 packages audited, 0 vulnerable" in capsys.readouterr().out
    assert audit.audit(PINNED, answering(known(a=[PROBLEM], b=[]), status=1)) == 1
    assert "a 1.0: PYSEC-1, fixed in 1.1" in capsys.readouterr().out


def test_an_audit_that_was_none_says_so(capsys) -> None:
    skipped = {"dependencies": [*known(a=[])["dependencies"], {"name": "b", "skip_reason": "not found"}]}
    for answer, why in (
        (
            answering(stderr="ERROR: connection to the database failed", status=1),
            "ERROR: connection to the database failed",
        ),
        (answering(stderr="No module named pip_audit", status=1), "No module named pip_audit"),
        (answering(skipped), "no answer about b"),
        (answering(known(), status=0), "no answer about a, b"),
    ):
        assert audit.audit(PINNED, answer) == 3
        assert f"not audited: {why}" in capsys.readouterr().err


def test_builds_are_audited_as_their_release() -> None:
    asked = []

    def run(command: list[str]) -> subprocess.CompletedProcess:
        asked.append(Path(command[-1]).read_text())
        return subprocess.CompletedProcess(command, 0, json.dumps(known(a=[], b=[])), "")

    assert audit.audit(PINNED, run) == 0
    assert asked == ["a==1.0\nb==2.0\n"]
