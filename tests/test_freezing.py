"""freeze: which parameters a pattern names, and that the gradient goes on through what is frozen."""

import copy

import pytest
import torch
from support.models import batch, llama
from torch import nn

from refkl import freeze, frozen_parameters, score_tokens, trainable_parameters


def names_below(model, *paths):
    return [name for name, _ in model.named_parameters() if name.startswith(tuple(f"{path}." for path in paths))]


def test_none_freezes_everything():
    model = llama()
    assert freeze(model) == frozen_parameters(model) == [name for name, _ in model.named_parameters()]
    assert trainable_parameters(model) == []


def test_a_path_matches_that_module_and_what_is_below_it():
    model = llama()
    frozen = freeze(model, "model.layers.1")
    assert frozen == frozen_parameters(model) == names_below(model, "model.layers.1")
    assert len(frozen) == 9


def test_layer_1_is_not_layer_10():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(12))})
    assert freeze(model, ["layers.1"]) == ["layers.1.weight", "layers.1.bias"]
    assert len(trainable_parameters(model)) == 22
    assert freeze(model, ["layers.10", "layers.3"]) == names_below(model, "layers.3", "layers.10")


def test_a_star_stands_for_one_part():
    model = llama()
    assert freeze(model, "model.layers.*.mlp") == names_below(model, "model.layers.0.mlp", "model.layers.1.mlp")
    with pytest.raises(ValueError, match="matches no parameter"):
        freeze(model, "model.*.mlp")


def test_a_parameter_can_be_named():
    model = llama()
    assert freeze(model, ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"]) == [
        "model.layers.0.self_attn.q_proj.weight",  # in the model's order
        "model.norm.weight",
    ]


def test_patterns_add_up():
    model = llama()
    freeze(model, "model.layers.0")
    freeze(model, ["model.embed_tokens", "model.layers.0.mlp"])
    assert frozen_parameters(model) == names_below(model, "model.embed_tokens", "model.layers.0")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("model.layer.1", r"'model.layer.1' matches no parameter of LlamaForCausalLM.*Did you mean 'model.layers.1'"),
        ("model.layers.10", r"Did you mean 'model.layers.[01]'"),
        ("model.embed", r"matches no parameter.*Did you mean 'model.embed_tokens'"),  # no prefix of a part
        ("layers.1", r"matches no parameter"),  # from the root alone
        ("", r"matches no parameter"),
    ],
)
def test_a_pattern_that_matches_nothing_raises_and_freezes_nothing(pattern, message):
    model = llama()
    with pytest.raises(ValueError, match=message):
        freeze(model, ["model.norm", pattern])
    assert frozen_parameters(model) == []


def test_embeddings_below_a_frozen_block_get_the_gradient_that_they_had():
    model, tokens = llama(), batch()
    whole = copy.deepcopy(model)
    freeze(model, "model.layers")
    for each in (model, whole):
        score_tokens(each, tokens).logp.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0
    for (name, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        if name.startswith("model.layers."):
            assert parameter.grad is None and other.grad is not None
        else:
            assert torch.equal(parameter.grad, other.grad), name


@pytest.mark.parametrize("tied", [False, True])
def test_the_optimizer_gets_what_trains_and_moves_nothing_else(tied):
    model = llama(tie_word_embeddings=tied)
    freeze(model, ["model.layers.0", "model.norm"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = trainable_parameters(model)
    assert len(set(map(id, chosen))) == len(chosen) == len(before) - len(frozen_parameters(model))
    optimizer = torch.optim.AdamW(chosen, lr=0.1, weight_decay=0.5)  # decay moves what has no gradient, too
    score_tokens(model, batch()).logp.sum().backward()
    optimizer.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == [name for name in before if name not in frozen_parameters(model)]


def test_a_tied_weight_is_frozen_by_either_of_its_names():
    for path in ("lm_head", "model.embed_tokens"):
        model = llama(tie_word_embeddings=True)
        freeze(model, path)
        assert not model.lm_head.weight.requires_grad and not model.model.embed_tokens.weight.requires_grad
        assert frozen_parameters(model) == ["model.embed_tokens.weight"]
