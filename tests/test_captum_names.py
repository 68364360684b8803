"""The page for those who come from captum: all of captum's names, and names that exist here."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "coming-from-captum.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="no pages in this distribution")

# All that ``captum.attr``, ``captum.robust`` and ``captum.metrics`` export in 0.9.0.
EXPORTED = """
Attribution GradientAttribution PerturbationAttribution NeuronAttribution LayerAttribution
IntegratedGradients DataLoaderAttribution DeepLift DeepLiftShap InputXGradient Saliency
GuidedBackprop Deconvolution GuidedGradCam FeatureAblation FeaturePermutation Occlusion
ShapleyValueSampling ShapleyValues LimeBase Lime LRP KernelShap LayerConductance
LayerGradientXActivation LayerActivation LayerFeaturePermutation LayerFeatureAblation
LLMAttribution LLMAttributionResult LLMGradientAttribution RemoteLLMAttribution RemoteLLMProvider
VLLMProvider InternalInfluence InterpretableInput LayerGradCam LayerDeepLift LayerDeepLiftShap
LayerGradientShap LayerIntegratedGradients LayerLRP NeuronConductance NeuronFeatureAblation
NeuronGradient NeuronIntegratedGradients NeuronDeepLift NeuronDeepLiftShap NeuronGradientShap
NeuronDeconvolution NeuronGuidedBackprop NoiseTunnel ProductBaselines GradientShap ImageMaskInput
InterpretableEmbeddingBase TextTemplateInput TextTokenInput TokenReferenceBase visualization
configure_interpretable_embedding_layer remove_interpretable_embedding_layer Summarizer CommonStats
ClassSummarizer Mean StdDev MSE Var Min Max Sum Count StatValue SummarizerSingleTensor
FGSM AttackComparator MinParamPerturbation Perturbation PGD
infidelity infidelity_perturb_func_decorator sensitivity_max
"""
ROOMS = ("", ".attribution", ".attribution.lrp", ".targets", ".metrics", ".robustness")
NOT_OURS = {"TensorDictModule", "TensorDict"}


def rows(page: str) -> list[list[str]]:
    """The cells of every line of every table."""
    lines = [line for line in page.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def public() -> dict[str, Any]:
    """Every public name of the library, optional extras left out."""
    found: dict[str, Any] = {}
    for room in ROOMS:
        module: ModuleType = importlib.import_module(f"tdhook_like{room}")
        found.update({name: getattr(module, name) for name in module.__all__})
    return found


def calls_in(code: str) -> list[ast.Call]:
    try:
        tree = ast.parse(code, mode="eval")
    except SyntaxError:
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def takes(cls: Any, option: str) -> bool:
    """Whether a class takes an option, itself or, as its base's, by ``**options``."""
    parameters = inspect.signature(cls).parameters
    fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    if option in parameters:
        return True
    return option in fields and any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_every_name_of_captums_has_a_row():
    page = PAGE.read_text(encoding="utf-8")
    named = {
        span for first, *_ in rows(page[page.index("## Every name") :]) for span in spans(first)
    }
    assert [name for name in EXPORTED.split() if name not in named] == []


def test_what_captums_names_become_exists_and_takes_what_the_page_gives_it():
    known, wrong, seen = public(), [], set()
    page = PAGE.read_text(encoding="utf-8").partition("## On what they agree")[0]
    for _, here, *_ in rows(page):
        for code in spans(here):
            for call in calls_in(code):
                name = getattr(call.func, "id", None)
                if name is None or name in NOT_OURS or name in ("prepare", "key_shares"):
                    continue
                if name not in known:
                    wrong.append(name)
                    continue
                seen.add(name)
                options = [k.arg for k in call.keywords if k.arg is not None]
                wrong += [f"{name}({o}=)" for o in options if not takes(known[name], o)]
    assert wrong == []
    assert len(seen) > 30


def test_names_without_a_call_exist_too():
    known, page = public(), PAGE.read_text(encoding="utf-8").partition("## On what they agree")[0]
    here = [code for _, cell, *_ in rows(page) for code in spans(cell)]
    more = spans(page[page.index("Without a counterpart in captum") :])
    classes = [code for code in [*here, *more] if re.fullmatch(r"[A-Z][A-Za-z]+", code)]
    functions = [code for code in more if re.fullmatch(r"[a-z]+(_[a-z]+)+", code)]
    assert len(classes) > 12 and len(functions) > 2
    named = [*classes, *functions, "key_shares"]
    assert [name for name in named if name not in known and name not in {"Y", *NOT_OURS}] == []


def test_drawings_that_the_page_names_exist():
    viz = pytest.importorskip("tdhook_like.viz", reason="needs matplotlib", exc_type=ImportError)
    (row,) = [row for row in rows(PAGE.read_text(encoding="utf-8")) if row[0] == "`visualization`"]
    room, *drawings = spans(row[1])
    assert room == viz.__name__ and len(drawings) > 3
    assert [name for name in drawings if name not in viz.__all__] == []
