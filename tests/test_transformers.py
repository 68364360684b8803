"""Unmodified transformers: relevance is what the rules give in a model that was written for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

import reference_transformer as ref
from tdhook_like import LRP
from tdhook_like.attribution.lrp import CPLRP, AttnLRP

transformers = pytest.importorskip("transformers")

EMBEDDINGS = {"inputs_embeds": "embeddings"}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        build: From the implementation of attention to a small model with random weights.
        logits: The same model written for the rules.
        reads: The keys that it reads, by its arguments.
        shape: Of the explained input.
        single: Whether it computes attention weights in single precision, if by hand.
        target: The logit of a position, or of the whole.
    """

    build: Callable[[str], Any]
    logits: Callable[..., Tensor]
    reads: dict[str, str]
    shape: tuple[int, ...]
    single: bool
    target: tuple[Any, ...]


def built(model: str, config: str, **options: Any) -> Callable[[str], Any]:
    def build(implementation: str) -> Any:
        settings = getattr(transformers, config)(**options, attn_implementation=implementation)
        made = getattr(transformers, model)(settings).double().eval()
        for parameter in made.parameters():  # norms and biases start at ones and zeros
            nn.init.normal_(parameter, 0.0, 0.3)
        return made

    return build


TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
DECODER = {
    **{"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, **TOKENS},
}
ENCODER = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_labels": 5},
}
FAMILIES = {
    "gpt2": Family(
        built(
            *("GPT2LMHeadModel", "GPT2Config"),
            **{"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 11, "n_positions": 8},
            **TOKENS,
        ),
        ref.gpt2_logits,
        EMBEDDINGS,
        (2, 5, 16),
        single=False,
        target=(-1, 3),
    ),
    "bert": Family(
        built(
            *("BertForSequenceClassification", "BertConfig"),
            **{"vocab_size": 11, "max_position_embeddings": 8, **ENCODER},
        ),
        ref.bert_logits,
        EMBEDDINGS,
        (2, 5, 16),
        single=False,
        target=(3,),
    ),
    "llama": Family(
        built("LlamaForCausalLM", "LlamaConfig", **DECODER),
        ref.llama_logits,
        EMBEDDINGS,
        (2, 5, 16),
        single=True,
        target=(-1, 3),
    ),
    "qwen2": Family(
        built("Qwen2ForCausalLM", "Qwen2Config", **DECODER),
        ref.llama_logits,
        EMBEDDINGS,
        (2, 5, 16),
        single=True,
        target=(-1, 3),
    ),
    "gemma": Family(
        built("GemmaForCausalLM", "GemmaConfig", **DECODER),
        ref.llama_logits,
        EMBEDDINGS,
        (2, 5, 16),
        single=True,
        target=(-1, 3),
    ),
    "vit": Family(
        built(
            *("ViTForImageClassification", "ViTConfig"),
            **{"image_size": 8, "patch_size": 4, "num_channels": 3, **ENCODER},
        ),
        ref.vit_logits,
        {"pixel_values": "pixels"},
        (2, 3, 8, 8),
        single=True,
        target=(3,),
    ),
}
MAPPERS = {"AttnLRP": AttnLRP, "CPLRP": CPLRP}

every_family = pytest.mark.parametrize("name", FAMILIES)
both_rules = pytest.mark.parametrize("rules", MAPPERS)
both_kinds = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def explained(model: Any, family: Family, x: Tensor, mapper: Any, **options: Any) -> TensorDict:
    (key,) = family.reads.values()
    td = TensorDict({key: x}, x.shape[:1])
    method = LRP(mapper, ("logits", *family.target), unhandled="raise", **options)
    with method.prepare(model, in_keys=family.reads, out_keys=["logits"]) as hooked:
        return hooked(td)


@every_family
@both_rules
@both_kinds
def test_relevance_is_that_of_the_model_written_for_the_rules(name, rules, implementation):
    family = FAMILIES[name]
    model, x = family.build(implementation), torch.randn(family.shape, dtype=torch.float64)
    by = ref.By(rules == "CPLRP", single=family.single and implementation == "eager")
    td = explained(model, family, x, MAPPERS[rules](epsilon=1e-15))
    leaf = x.clone().requires_grad_()
    weights = {key: value.detach() for key, value in model.state_dict().items()}
    logits = family.logits(weights, model.config, leaf, by)
    torch.testing.assert_close(td["logits"], logits, atol=1e-6, rtol=1e-6)
    score = logits[(slice(None), *family.target)].sum()
    want = leaf * torch.autograd.grad(score, leaf)[0]
    (key,) = family.reads.values()
    error = (td["attr", key] - want).abs().max() / want.abs().max()
    assert error < 1e-8, error


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "vit"])
@both_kinds
def test_cp_lrp_without_biases_conserves_the_logit(name, implementation):
    family = FAMILIES[name]
    model, x = family.build(implementation), torch.randn(family.shape, dtype=torch.float64)
    without_constants(model)
    td = explained(model, family, x, CPLRP(epsilon=1e-15))
    logit = td["logits"][(slice(None), *family.target)]
    total = td["attr", "embeddings"].sum((1, 2))
    # Norms add a little to a variance, which is constant; nothing else is lost.
    torch.testing.assert_close(total, logit, atol=0, rtol=1e-6)


def without_constants(model: nn.Module) -> None:
    """Biases, and embeddings of positions and kinds, which are added likewise, become zeros."""
    for path, parameter in model.named_parameters():
        if path.endswith("bias") or "position_emb" in path or "wpe" in path or "token_type" in path:
            nn.init.zeros_(parameter)


@both_kinds
def test_cp_lrp_conserves_the_logit_of_a_vision_transformer(implementation):
    family = FAMILIES["vit"]
    model, x = family.build(implementation), torch.randn(family.shape, dtype=torch.float64)
    without_constants(model)
    nn.init.zeros_(model.vit.embeddings.cls_token)
    td = explained(model, family, x, CPLRP(epsilon=1e-15))
    torch.testing.assert_close(
        td["attr", "pixels"].sum((1, 2, 3)), td["logits"][:, 3], atol=0, rtol=1e-6
    )


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
@both_rules
def test_the_ledger_of_a_transformer_says_where_all_relevance_went(name, rules):
    family = FAMILIES[name]
    model, x = family.build("sdpa"), torch.randn(family.shape, dtype=torch.float64)
    without_constants(model)
    (key,) = family.reads.values()
    td = TensorDict({key: x}, x.shape[:1])
    method = LRP(MAPPERS[rules](), ("logits", *family.target), ledger=1e-6)
    with method.prepare(model, in_keys=family.reads, out_keys=["logits"]) as hooked:
        hooked(td)
        ledger = hooked.ledger
    assert ("softmax" in ledger.causes) == (rules == "AttnLRP")
    plain = explained(model, family, x, MAPPERS[rules]())
    torch.testing.assert_close(td["attr", key], plain["attr", key], rtol=1e-6, atol=1e-9)


@every_family
@both_rules
def test_nothing_of_an_unmodified_model_lacks_a_rule(name, rules):
    family = FAMILIES[name]
    model, x = family.build("sdpa"), torch.randn(family.shape, dtype=torch.float64)
    method = LRP(MAPPERS[rules](), ("logits", *family.target))
    context = method.prepare(model, in_keys=family.reads, out_keys=["logits"])
    (key,) = family.reads.values()
    with context as hooked:
        hooked(TensorDict({key: x}, x.shape[:1]))
    assert context.applied["scaled_dot_product_attention"] == 2
    assert not context.unhandled


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_an_embedding_gives_is_explained_by_its_path(name, frozen):
    family, ids = FAMILIES[name], torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    model = family.build("sdpa").requires_grad_(not frozen)
    path = next(p for p, m in model.named_modules() if m is model.get_input_embeddings())
    method = LRP(AttnLRP(), ("logits", *family.target), at=[path], unhandled="raise")
    context = method.prepare(model, in_keys={"input_ids": "ids"}, out_keys=["logits"])
    with context as hooked:
        td = hooked(TensorDict({"ids": ids}, [2]))
    (found,) = td["attr_at"].values(True, True)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
    want = explained(model, family, embedded, AttnLRP())["attr", "embeddings"]
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    assert found.sum(-1).shape == ids.shape  # one number per token


@every_family
def test_both_implementations_of_attention_give_the_same_relevance(name):
    family = FAMILIES[name]
    x = torch.randn(family.shape, dtype=torch.float64)
    eager, fused = family.build("eager"), family.build("sdpa")
    fused.load_state_dict(eager.state_dict())
    (key,) = family.reads.values()
    one, other = (explained(model, family, x, AttnLRP())["attr", key] for model in (eager, fused))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * one.abs().max().item())


def test_padding_gets_no_relevance():
    family = FAMILIES["bert"]
    model, x = family.build("sdpa"), torch.randn(family.shape, dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    td = TensorDict({"embeddings": x, "mask": mask}, [2])
    reads = {"inputs_embeds": "embeddings", "attention_mask": "mask"}
    method = LRP(AttnLRP(), ("logits", 3))
    with method.prepare(model, in_keys=reads, out_keys=["logits"]) as hooked:
        td = hooked(td)
    relevance = td["attr", "embeddings"].abs().sum(-1)
    assert (relevance[1, 3:] == 0).all() and (relevance[mask.bool()] > 0).all()


@pytest.mark.parametrize("rules", MAPPERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_parameters_change_nothing(rules, frozen):
    family = FAMILIES["llama"]
    model, x = family.build("sdpa"), torch.randn(family.shape, dtype=torch.float64)
    want = explained(model, family, x, MAPPERS[rules]())["attr", "embeddings"]
    model.requires_grad_(not frozen)
    assert torch.equal(explained(model, family, x, MAPPERS[rules]())["attr", "embeddings"], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lower_precision_gives_nearly_the_same(name, dtype):
    family = FAMILIES[name]
    model = family.build("sdpa")
    x = torch.randn(family.shape, dtype=torch.float64).to(dtype).double()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).double()
    want = explained(model, family, x, CPLRP())["attr", "embeddings"]
    found = explained(model.to(dtype), family, x.to(dtype), CPLRP())["attr", "embeddings"]
    assert found.dtype == dtype
    error = (found.double() - want).norm() / want.norm()
    assert error < (1e-4 if dtype == torch.float32 else 0.1), error


@both_rules
def test_torchrls_decision_transformer_is_explained_by_key(rules):
    modules = pytest.importorskip("torchrl.modules")
    settings = modules.DecisionTransformer.DTConfig(
        n_embd=16, n_layer=2, n_head=2, n_inner=24, n_positions=16
    )
    model = modules.DecisionTransformer(4, 2, settings).double().eval()
    sizes = {"observation": 4, "action": 2, "return_to_go": 1}
    td = TensorDict({k: torch.randn(2, 3, n, dtype=torch.float64) for k, n in sizes.items()}, [2])
    method = LRP(MAPPERS[rules](epsilon=1e-15), ("hidden", -1, 5), unhandled="raise")
    with method.prepare(model, in_keys=list(sizes), out_keys=["hidden"]) as hooked:
        td = hooked(td)
    xs = [td[key].clone().requires_grad_() for key in sizes]
    weights = {key: value.detach() for key, value in model.state_dict().items()}
    hidden = ref.decision(weights, model.transformer.config, xs, ref.By(rules == "CPLRP"))
    torch.testing.assert_close(td["hidden"], hidden)
    grads = torch.autograd.grad(hidden[:, -1, 5].sum(), xs)
    for key, x, g in zip(sizes, xs, grads, strict=True):
        torch.testing.assert_close(td["attr", key], (x * g).detach(), rtol=1e-8, atol=1e-10)
    assert (td["attr", "action"][:, -1] == 0).all()  # it is read behind what it is to be
