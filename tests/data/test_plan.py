"""The step plan: every prompt once an epoch, the same steps on any hardware, balanced and within the token budget."""

from types import SimpleNamespace

import numpy as np
import pytest
from examples import preference_data

from rm.data.plan import Layout, StepPlan, balance, group_rows, plan_micro_batches

PACKED, PADDED = Layout("shared_prefix", 0), Layout("concatenated", 0)
RNG = np.random.default_rng(0)
PREFIX, ANSWERS = RNG.integers(0, 300, 103), RNG.integers(1, 90, (103, 2))  # tokens of 103 pairs
COSTS = {PACKED: PREFIX + ANSWERS.sum(1), PADDED: 2 * (PREFIX + ANSWERS.max(1))}
both_layouts = pytest.mark.parametrize("layout", [PACKED, PADDED], ids=lambda layout: layout.name)


class Data:
    costs = COSTS.__getitem__

    def __len__(self) -> int:
        return 103


def make_plan(layout=PACKED, micro_batch_tokens=1024, rank=0, world=1, seed=3) -> StepPlan:
    config = SimpleNamespace(micro_batch_tokens=micro_batch_tokens, seed=seed)
    return StepPlan(Data(), layout, config, 16, rank, world)


def widths(layout: Layout, tokens: int) -> list[list[int]]:
    """Tokens of every row of every micro-batch of all prompts."""
    (plan,) = plan_micro_batches(np.arange(103), COSTS[Layout(layout.name, 0)], layout, tokens)
    return [[int(COSTS[Layout(layout.name, 0)][row].sum()) for row in micro_batch.rows] for micro_batch in plan]


def test_costs_by_hand():
    """A pair, three answers, and one answer."""
    data = preference_data([[[1, 2, 3, 4], [1, 2, 5]], [[1, 2, 3], [1, 4], [1, 5, 6, 7]], [[1, 2, 3]]])
    assert data.costs(PACKED).tolist() == [2 + 2 + 1, 1 + 2 + 1 + 3, 3]
    assert data.costs(PADDED).tolist() == [2 * 4, 3 * 4, 3] and data.num_answers.tolist() == [2, 3, 1]
    assert data.costs(Layout("concatenated", 0, by_tree=True)).tolist() == [4 + 3, 3 + 2 + 4, 3]


def test_balance_pack_and_group_by_hand():
    assert balance([5, 4, 3, 3, 1], 2) == [[0, 3], [1, 2, 4]]
    # one row in each micro-batch, filled without rounding up; a prompt that is longer runs alone
    assert group_rows([60, 50, 40, 30, 20], 100, 100) == [[[0, 2]], [[1, 3, 4]]]
    assert group_rows([200, 50, 45, 5], 100, 100) == [[[0]], [[1, 2, 3]]]
    assert group_rows([50, 50, 1], 100, 100) == [[[0, 1]], [[2]]] and group_rows([], 100, 256) == []
    # two rows of 128 in each micro-batch; the longest prompt that fits comes next
    assert group_rows([60, 50, 40, 30, 10, 90], 100, 256) == [[[5, 3], [0, 1, 4]], [[2]]]
    # a row of 256 for a prompt of 200, whose rest is filled; one row may be longer than a micro-batch
    assert group_rows([30, 200, 20, 40, 70], 100, 128) == [[[1, 3]], [[4, 0, 2]]]
    # one prompt per row
    assert group_rows([10, 40, 30, 20], 0, 80) == [[[1], [2]], [[3], [0]]] and group_rows([9, 9], 0, 1) == [
        [[0]],
        [[1]],
    ]


@both_layouts
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 700, 4096, 10**6])
def test_each_prompt_once_an_epoch(layout, world, budget):
    plans, seen = [make_plan(layout, budget, rank, world) for rank in range(world)], []
    for step in range(7):
        shares = [plan.step(step) for plan in plans]
        assert len({len(share) for share, _ in shares}) == 1  # the same number of forward passes on every process
        prompts = [i for share, _ in shares for mb in share if not mb.is_dummy for i in mb.prompts]
        assert {count for _, count in shares} == {len(prompts)} and set(prompts) == set(make_plan().prompts(step))
        seen += prompts
    assert sorted(seen) == list(range(103))


def test_order_depends_on_seed_and_epoch_alone():
    plan = make_plan()
    assert plan.prompts(2).tolist() == make_plan(PADDED, 700, world=2, rank=1).prompts(2).tolist()
    assert plan.prompts(2).tolist() != make_plan(seed=4).prompts(2).tolist()
    assert plan.prompts(0).tolist() != plan.prompts(7).tolist()
    assert len(plan.prompts(6)) == 103 - 6 * 16  # the rest
    assert (plan.steps_per_epoch, plan.total_steps(3), plan.total_steps(0.5), plan.total_steps(3, 5)) == (7, 21, 4, 5)


@both_layouts
def test_micro_batches_keep_the_token_budget(layout):
    padded = [len(rows) * max(rows) for rows in widths(layout, 2048)]
    assert max(padded) <= 2048 and sum(padded) <= 1.1 * COSTS[layout].sum()  # little padding


def test_rows_with_a_dense_mask_have_little_more_than_the_useful_area():
    """Prompts of very different lengths: long rows for the long prompts only."""
    costs = np.random.default_rng(0).lognormal(6, 0.8, 500).astype(int)
    (plan,) = plan_micro_batches(np.arange(500), costs, PACKED, 8192)
    rows = [[costs[row].sum() for row in micro_batch.rows] for micro_batch in plan]
    area = sum(len(widths) * (-(-max(widths) // 64) * 64) ** 2 for widths in rows)
    assert sorted(i for mb in plan for i in mb.prompts) == list(range(500))
    assert area < 1.8 * (costs**2).sum() < len(costs) * costs.max() ** 2 / 5
    assert len({-(-max(widths) // 64) for widths in rows}) < len(rows)


def test_attention_by_tree_gets_one_long_row():
    rows = [width for (width,) in widths(Layout("shared_prefix", 0, by_tree=True), 2048)]
    total = COSTS[PACKED].sum()
    assert sum(rows) == total and len(rows) == -(-total // 2048)  # no more rows than needed,
    assert max(rows) <= 2048 and sorted(rows)[1] > 2000  # all full but the last
    assert max(map(max, widths(PACKED, 2048))) <= -(-COSTS[PACKED].max() // 64) * 64


def test_processes_get_balanced_tokens_and_dummies():
    costs = COSTS[PACKED]
    plans = plan_micro_batches(np.arange(103), costs, PACKED, 4096, num_processes=3)
    loads = [sum(costs[mb.prompts].sum() for mb in plan if not mb.is_dummy) for plan in plans]
    assert max(loads) - min(loads) <= costs.max() and max(loads) <= 1.05 * min(loads)
    few = plan_micro_batches(np.array([7, 8]), np.array([30, 20]), PADDED, 100, num_processes=3)
    found = [(mb.rows, mb.is_dummy) for plan in few for mb in plan]
    assert found == [([[7]], False), ([[8]], False), ([[8]], True)]


def test_micro_batches_are_halved_until_the_longest_prompt_runs_alone():
    plan = make_plan(micro_batch_tokens=4096)
    longest, budgets = plan.costs[plan.prompts(2)].max(), []
    while plan.halve_micro_batches(2):
        budgets.append(plan.micro_batch_tokens)
    assert budgets[:2] == [2048, 1024] and budgets[-1] <= longest < 2 * budgets[-1] + 2
