"""Any number of answers to a prompt get the rewards that each would get alone."""

import numpy as np
import pytest
import torch
from conftest import PAD, tiny_classifier

from rm.attention import SDPA_BY_TREE
from rm.collate import Tree
from rm.model import RewardModel
from rm.score import score_trees


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
@pytest.mark.parametrize("kernel", ["sdpa", SDPA_BY_TREE])
@pytest.mark.parametrize("budget", [1, 64, 4096])
def test_answers_get_the_rewards_of_each_alone(layout, kernel, budget):
    classifier = tiny_classifier("llama")
    rng = np.random.default_rng(0)
    shapes = [(5, [4]), (0, [2, 7, 3]), (8, [1, 1]), (3, [6, 2, 2, 9, 5])]
    trees = [Tree(rng.integers(3, 64, p), [rng.integers(3, 64, n) for n in ns]) for p, ns in shapes]
    with torch.no_grad():
        alone = [
            [classifier(input_ids=torch.tensor(s)[None]).logits[0, 0].item() for s in tree.sequences()]
            for tree in trees
        ]
    model = RewardModel(classifier).train()
    model.bare.set_attn_implementation(kernel)
    options = dict(layout=layout, micro_batch_tokens=budget, pad_token_id=PAD, device=torch.device("cpu"))
    rewards = score_trees(model, trees, **options)
    assert model.training
    for got, expected in zip(rewards, alone, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)
