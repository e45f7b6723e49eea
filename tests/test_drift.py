"""The guard against new releases: what it finds, and what it says about versions that nobody has tested."""

from __future__ import annotations

import re
import tomllib
import warnings
from pathlib import Path

import pytest

from fastencoder import conversion, explain, versions
from fastencoder.fingerprints import __main__ as fingerprints
from tools import drift

from . import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(monkeypatch):
    """Other versions than those that are installed."""
    found = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "triton": None}
    monkeypatch.setattr(versions, "installed", found.get)
    monkeypatch.setattr(versions, "_warned", False)
    versions.untested.cache_clear()
    yield found
    versions.untested.cache_clear()


def test_tested_versions_are_those_of_the_readme_and_of_the_package() -> None:
    readme = (ROOT / "README.md").read_text()
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package, (oldest, newest) in versions.TESTED.items():
        assert re.search(
            rf"^\| {package}\b.*\| {versions.dotted(oldest)} to {versions.dotted(newest)}", readme, re.M
        ), package
        assert any(line.startswith(f"{package}>={versions.dotted(oldest)}") for line in required), package


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.2"])
def test_nothing_is_said_about_tested_versions(installed, version: str) -> None:
    installed["torch"] = version
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = explain(tiny.bert())
        conversion.to_fast(tiny.bert())
    assert report.untested_versions == () and "warning" not in str(report)
    assert report.to_dict()["untested_versions"] == []


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        ("transformers", "5.24.0.dev0", "transformers 5.24.0.dev0 is newer than the tested versions 5.17 to 5.23"),
        ("transformers", "6.0.0", "transformers 6.0.0 is newer"),
        ("torch", "2.10.1", "torch 2.10.1 is older than the tested versions 2.11 to 2.13"),
        ("triton", "4.0", "triton 4.0 is newer"),
    ],
)
def test_an_untested_version_is_named_by_explain_and_once_by_to_fast(
    installed, package: str, version: str, said: str
) -> None:
    installed[package] = version
    report = explain(tiny.bert())
    assert len(report.untested_versions) == 1 and said in report.untested_versions[0]
    assert "warning: " + " ".join(said.split()[:2]) in str(report)
    assert report.to_dict()["untested_versions"] == list(report.untested_versions)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            conversion.to_fast(tiny.bert())
    assert [each.filename for each in caught if "fastencoder:" in str(each.message)] == [__file__]
    assert said in str(caught[0].message) and "fastencoder verify" in str(caught[0].message)


@pytest.mark.parametrize(
    ("available", "chosen"),
    [
        (["2.9.1", "2.13.0", "2.13.0+cpu", "2.12.0"], "torch==2.13.0+cpu"),
        (["2.14.0", "2.13.0+cpu", "2.9.0+cpu"], "torch==2.13.0+cpu"),
        (["2.9.0", "2.10.0", "2.10.1"], "torch==2.10.1"),
    ],
)
def test_the_newest_torch_as_a_cpu_build(available: list[str], chosen: str) -> None:
    assert drift.choose_torch(available) == chosen


def test_this_interpreter_is_examined(capsys, monkeypatch) -> None:
    """The conformance suite runs, in a process of its own; one row of it here."""
    monkeypatch.setattr(fingerprints, "unregistered", lambda *_: [])  # reads every file of transformers
    assert drift.main(["--here", "--only", "test_hidden_states and electra", "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^torch \S+ \(tested with 2\.11 to 2\.13\)$", said, re.M)
    assert re.search(r"conformance: [1-9]\d* rows ran, 0 failed", said)
    assert re.search(r"\d+ registered classes are in transformers \S+; 0 differ", said)


RESULTS = """<testsuites><testsuite>
<testcase classname="tests.conformance.test_conformance" name="test_fp32[a]"/>
<testcase classname="tests.conformance.test_conformance" name="test_fp32[b]"><failure message="assert 0.2&#10;more"/></testcase>
<testcase classname="tests.conformance.test_conformance" name="test_fp32[c]"><skipped message="no such class"/></testcase>
<testcase classname="tests.conformance.test_conformance" name="test_fp32[d]"><error message="ImportError: gone"/></testcase>
</testsuite></testsuites>"""


def test_rows_that_fail_and_classes_that_changed_are_named(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "results.xml").write_text(RESULTS)
    results = drift.read_results(tmp_path / "results.xml")
    assert results[0] == 3 and [why for _, why in results[1]] == ["assert 0.2", "ImportError: gone"]
    changed = fingerprints.Difference(
        fingerprints.CHANGED, "transformers.models.bert.modeling_bert.BertLayer", "another source"
    )
    monkeypatch.setattr(drift, "_changed_classes", lambda: [changed])
    monkeypatch.setattr(drift, "conformance", lambda *_: results)
    assert drift.main(["--here"]) == 1
    said = capsys.readouterr().out
    assert "test_fp32[b]" in said and "ImportError: gone" in said and "3 rows ran, 2 failed" in said
    assert "BertLayer" in said and "another source" in said


def test_a_changed_class_alone_is_no_failure_and_no_row_is_one(monkeypatch, tmp_path: Path) -> None:
    changed = fingerprints.Difference(
        fingerprints.CHANGED, "transformers.models.bert.modeling_bert.BertLayer", "another source"
    )
    monkeypatch.setattr(drift, "_changed_classes", lambda: [changed])
    monkeypatch.setattr(drift, "_count_installed", lambda: 1)
    monkeypatch.setattr(drift, "conformance", lambda *_: (5, []))
    assert drift.main(["--here"]) == 0
    monkeypatch.setattr(drift, "conformance", lambda *_: drift.read_results(tmp_path / "none"))
    assert drift.main(["--here"]) == 1


def test_an_environment_that_cannot_be_made(tmp_path: Path, capsys) -> None:
    assert drift.main(["--venv", str(tmp_path / "venv"), "--torch", str(tmp_path / "no-such-wheel.whl")]) == 2
    assert "could not be made" in capsys.readouterr().err
