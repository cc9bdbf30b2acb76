"""The step plan: every pair once an epoch, the same steps on any hardware, balanced and within the token budget."""

import numpy as np
import pytest

from rm.data.plan import PairLengths, StepPlan, cut_micro_batches, deal, pack_rows, plan_micro_batches


def lengths(num_pairs=103, seed=0) -> PairLengths:
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, 300, num_pairs)
    return PairLengths(prefix + rng.integers(1, 90, num_pairs), prefix + rng.integers(1, 90, num_pairs), prefix)


def make_plan(layout="shared_prefix", micro_batch_tokens=1024, rank=0, world=1, seed=3, batch=16) -> StepPlan:
    return StepPlan(
        lengths(),
        train_batch_size=batch,
        layout=layout,
        micro_batch_tokens=micro_batch_tokens,
        seed=seed,
        process_index=rank,
        num_processes=world,
    )


def test_costs_by_hand():
    one = PairLengths(np.array([10]), np.array([7]), np.array([4]))
    assert one.cost("shared_prefix").tolist() == [4 + 6 + 3]
    assert one.cost("concatenated").tolist() == [2 * 10]


def test_short_pairs_for_a_check():
    prefix = np.arange(100)[::-1]
    assert PairLengths(prefix + 1, prefix + 1, prefix).short_ones() == [89, 88, 87, 86]
    three = np.array([5, 9, 7])
    assert PairLengths(three, three, three - 1).short_ones() == [0, 2, 1]


def test_deal_and_pack_by_hand():
    assert deal([5, 4, 3, 3, 1], 2) == [[0, 3], [1, 2, 4]]
    assert sorted(map(sorted, pack_rows([60, 50, 40, 30, 20], 100))) == [[0], [1, 4], [2, 3]]
    assert sorted(map(sorted, pack_rows([60, 50, 40, 30, 10], 100))) == [[0, 3, 4], [1, 2]]
    assert pack_rows([200, 50, 50], 100) == [[0], [1, 2]]  # a pair longer than a row makes the rows longer
    assert cut_micro_batches([["a"], ["b"], ["c"], ["d"]], [10, 40, 30, 20], 80) == [[["b"], ["c"]], [["d"], ["a"]]]


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 700, 4096, 10**6])
def test_each_pair_once_an_epoch(layout, world, budget):
    plans = [make_plan(layout, budget, rank, world) for rank in range(world)]
    seen = []
    for step in range(plans[0].steps_per_epoch):
        shares = [plan.step(step) for plan in plans]
        assert len({len(share) for share, _ in shares}) == 1  # the same number of forward passes on every process
        assert {count for _, count in shares} == {sum(mb.num_pairs for share, _ in shares for mb in share)}
        seen += [i for share, _ in shares for mb in share if not mb.is_filler for row in mb.rows for i in row]
    assert sorted(seen) == list(range(103))


def test_a_step_is_the_same_pairs_on_any_hardware():
    for step in range(14):  # two epochs
        sets = {
            frozenset(
                i
                for rank in range(world)
                for mb in make_plan(layout, budget, rank, world).step(step)[0]
                if not mb.is_filler
                for row in mb.rows
                for i in row
            )
            for layout in ("shared_prefix", "concatenated")
            for budget, world in ((1, 1), (5000, 1), (800, 2), (5000, 3))
        }
        assert len(sets) == 1


def test_order_depends_on_seed_and_epoch_alone():
    plan = make_plan()
    assert plan.indices(2).tolist() == make_plan(world=2, rank=1).indices(2).tolist()
    assert plan.indices(2).tolist() != make_plan(seed=4).indices(2).tolist()
    assert plan.indices(0).tolist() != plan.indices(plan.steps_per_epoch).tolist()
    assert len(plan.indices(6)) == 103 - 6 * 16  # the ragged tail is kept


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
def test_micro_batches_keep_the_token_budget(layout):
    costs = lengths().cost(layout)
    (plan,) = plan_micro_batches(np.arange(103), costs, layout, 2048)
    for micro_batch in plan:
        widest = max(sum(costs[i] for i in row) for row in micro_batch.rows)
        assert len(micro_batch.rows) * widest <= 2048
    padded = sum(len(mb.rows) * max(sum(costs[i] for i in row) for row in mb.rows) for mb in plan)
    assert padded <= 1.1 * costs.sum()  # little padding


def test_processes_get_balanced_tokens():
    costs = lengths().cost("shared_prefix")
    plans = plan_micro_batches(np.arange(103), costs, "shared_prefix", 4096, num_processes=3)
    loads = [sum(costs[i] for mb in plan if not mb.is_filler for row in mb.rows for i in row) for plan in plans]
    assert max(loads) - min(loads) <= costs.max()
    assert max(loads) <= 1.05 * min(loads)


def test_fewer_pairs_than_processes():
    plans = plan_micro_batches(np.array([7]), np.array([30]), "concatenated", 100, num_processes=3)
    assert sorted(sum(mb.num_pairs for mb in plan) for plan in plans) == [0, 0, 1]
    assert all(mb.rows == [[7]] for plan in plans for mb in plan)


def test_total_steps_are_counted_once():
    plan = make_plan()  # 103 pairs, 16 a step: 7 steps an epoch
    assert plan.steps_per_epoch == 7
    assert plan.total_steps(3) == 21
    assert plan.total_steps(0.5) == 4
    assert plan.total_steps(3, max_steps=5) == 5


def test_kernels_that_skip_blocks_get_one_long_row():
    """FlexAttention (blocks of 128) and attention tree by tree (1): a micro-batch is one row of almost the budget."""
    indices, costs = np.arange(103), lengths().cost("shared_prefix")
    for block in (1, 128):
        (plan,) = plan_micro_batches(indices, costs, "shared_prefix", 2048, block_size=block)
        assert all(len(micro_batch.rows) == 1 and micro_batch.pad_to_multiple_of == block for micro_batch in plan)
        widths = [costs[micro_batch.rows[0]].sum() for micro_batch in plan]
        assert max(widths) <= 2048 and min(widths) > 1500 and sum(widths) == costs.sum()
    (dense,) = plan_micro_batches(indices, costs, "shared_prefix", 2048)
    assert max(costs[row].sum() for micro_batch in dense for row in micro_batch.rows) <= max(256, costs.max())


def test_micro_batches_are_halved_until_the_longest_pair_runs_alone():
    plan = make_plan(micro_batch_tokens=4096)
    longest = plan.costs[plan.indices(2)].max()
    budgets = []
    while plan.halve_micro_batches(2):
        budgets.append(plan.micro_batch_tokens)
    assert budgets[:2] == [2048, 1024] and budgets[-1] <= longest < 2 * budgets[-1] + 2
