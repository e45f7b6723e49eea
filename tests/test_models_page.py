"""docs/models.md is what the registry says, and docs/models.json what the installed transformers is made of."""

from __future__ import annotations

import json

import pytest
import transformers

from fastencoder import registry
from fastencoder.families.left_out import LEFT_OUT
from tools import models_page
from tools.survey import survey_of

SURVEY = json.loads((models_page.DOCS / "models.json").read_text())


def test_the_page_is_up_to_date() -> None:
    written = (models_page.DOCS / "models.md").read_text()
    assert written == models_page.page(SURVEY), "python -m tools.models_page"


def test_every_shipped_class_is_on_the_page() -> None:
    page = (models_page.DOCS / "models.md").read_text()
    shipped = [entry for entry in registry.entries() if models_page._shipped(entry.layer_class)]
    assert len(shipped) > 200
    missing = [e.layer_class for e in shipped if not e.adapter.decoder and models_page._short(e.layer_class) not in page]
    assert not missing


def test_every_class_without_a_fast_layer_has_a_reason() -> None:
    undescribed = [line for line in models_page.page(SURVEY).splitlines() if models_page.UNDESCRIBED in line]
    assert not undescribed, "give the reason in fastencoder/families/left_out.py"


@pytest.mark.parametrize(
    "model_type", ["bert", "deberta-v2", "modernbert", "vit", "t5", "swin", "wav2vec2-conformer", "longformer", "llava"]
)
def test_the_survey_holds(model_type: str) -> None:
    """What a model of this type gets today is what the file says."""
    if SURVEY["versions"]["transformers"] != transformers.__version__:
        pytest.skip("the survey is of another transformers")
    found = survey_of(model_type)
    assert isinstance(found, dict)
    assert {name: row[0] for name, row in found.items()} == {
        name: row[0] for name, row in SURVEY["models"][model_type].items()
    }


def test_left_out_classes_are_not_registered() -> None:
    assert not set(LEFT_OUT) & {entry.layer_class for entry in registry.entries()}
    assert all(LEFT_OUT.values())


def test_how_much_is_covered() -> None:
    """At least 240 layer classes, and 400 model types at one of the two levels."""
    entries = [e for e in registry.entries() if e.layer_class.startswith("transformers.") and not e.adapter.decoder]
    assert len(entries) >= 240
    levels = {model_type: {row[0] for row in rows.values()} for model_type, rows in SURVEY["models"].items()}
    assert sum(1 for found in levels.values() if found & {"layer", "attention"}) >= 400


# The encoder types of optimum 1.27's BetterTransformer, those whose attention it replaced, and Whisper.
BETTERTRANSFORMER = """
albert bart bert bert-generation blenderbot blip-2 camembert clip data2vec-text deit distilbert electra ernie fsmt hubert
layoutlm m2m_100 marian markuplm mbart pegasus prophetnet rembert roberta roc_bert roformer splinter t5 tapas vilt vit
vit_mae vit_msn wav2vec2 whisper xlm-roberta yolos
"""


@pytest.mark.parametrize("model_type", BETTERTRANSFORMER.split())
def test_everything_bettertransformer_knew_is_fast(model_type: str) -> None:
    assert "layer" in {row[0] for row in SURVEY["models"][model_type].values()}
