"""Batches by hand: what is where in the rows of both layouts, and the columns of answers and comparisons."""

import numpy as np
import pytest
import torch
from examples import preference_data

from rm.collate import collate, collate_trees
from rm.data.plan import Layout, MicroBatch
from rm.data.tokenize import Tree

PACKED, PADDED = Layout("shared_prefix", 0, by_tree=True), Layout("concatenated", 0)
UNSHARED = Layout("concatenated", 0, by_tree=True)
GROUP = [[11, 12, 13], [11, 12, 14, 15], [11, 12, 16]]  # prefix 11 12
PAIR = [[21, 22], [23]]  # no prefix
DATA = preference_data([GROUP, PAIR], [[(0, 2), (1, 0), (1, 2), (2, 1)], [(1, 0)]],
                       margin=[[1.0, 2.0, 3.0, 4.0], [5.0]], score=[[0.1, 0.2, 0.3], [0.4, 0.5]])  # fmt: skip


def test_concatenated_by_hand():
    """The first answers of all prompts, then the second ones, then the third ones."""
    batch = collate(DATA, MicroBatch([[0], [1]]), PADDED)
    assert batch.input_ids_RL.tolist() == [
        [11, 12, 13, 0], [21, 22, 0, 0], [11, 12, 14, 15], [23, 0, 0, 0], [11, 12, 16, 0],
    ]  # fmt: skip
    assert batch.attention_mask_RL.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert batch.end_row_N.tolist() == [0, 2, 4, 1, 3] and batch.end_index_N.tolist() == [2, 3, 2, 1, 0]
    assert not batch.is_packed and batch.tree_parts is None


def test_shared_prefix_by_hand():
    batch = collate(DATA, MicroBatch([[1, 0]]), PACKED)
    assert batch.input_ids_RL.tolist() == [[21, 22, 23, 11, 12, 13, 14, 15, 16]]
    assert batch.tree_RL.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1]]
    assert batch.branch_RL.tolist() == [[1, 1, 2, 0, 0, 1, 2, 2, 3]]
    assert batch.position_RL.tolist() == [[0, 1, 0, 0, 1, 2, 2, 3, 2]]
    assert batch.end_row_N.tolist() == [0] * 5 and batch.end_index_N.tolist() == [1, 2, 5, 7, 8]
    assert batch.tree_parts == [[0, 2, 1], [2, 1, 2, 1]] and batch.is_packed and batch.attention_mask_RL is None


def test_sequences_by_themselves_in_one_row():
    """`concatenated` for a kernel that computes tree by tree: trees of one answer, without a prefix."""
    batch = collate(DATA, MicroBatch([[1, 0]]), UNSHARED)
    assert batch.input_ids_RL.tolist() == [[21, 22, 23, 11, 12, 13, 11, 12, 14, 15, 11, 12, 16]]
    assert batch.tree_RL.tolist() == [[0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4]]
    assert batch.branch_RL.tolist() == [[1] * 13]
    assert batch.position_RL.tolist() == [[0, 1, 0, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2]]
    assert batch.end_row_N.tolist() == [0] * 5 and batch.end_index_N.tolist() == [1, 2, 5, 9, 12]
    assert batch.tree_parts == [[0, 2], [0, 1], [0, 3], [0, 4], [0, 3]] and batch.length_N.tolist() == [2, 1, 3, 4, 3]


def test_rows_with_a_dense_mask_by_hand():
    """Padded to a multiple of 64."""
    two = collate(DATA, MicroBatch([[0], [1]]), Layout("shared_prefix", 0))
    assert two.tree_RL.tolist() == [[0] * 6 + [-1] * 58, [0] * 3 + [-1] * 61]
    assert two.input_ids_RL[1].tolist() == [21, 22, 23] + [0] * 61
    assert two.end_row_N.tolist() == [0, 0, 0, 1, 1] and two.end_index_N.tolist() == [2, 4, 5, 1, 2]
    assert two.tree_parts is None


@pytest.mark.parametrize("layout", [PACKED, UNSHARED, PADDED], ids=["packed", "unshared", "padded"])
def test_comparisons_and_columns_by_hand(layout):
    rows = [[1, 0]] if layout.by_tree else [[1], [0]]
    batch = collate(DATA, MicroBatch(rows), layout)
    assert batch.chosen_C.tolist() == [1, 2, 3, 3, 4] and batch.rejected_C.tolist() == [0, 4, 2, 4, 3]
    assert batch.share_C.tolist() == [1, 0.25, 0.25, 0.25, 0.25] and batch.share_C.dtype == torch.float32
    assert batch.margin_C.tolist() == [5, 1, 2, 3, 4] and batch.weight_C.tolist() == [1] * 5
    assert batch.prompt_C.tolist() == [0, 1, 1, 1, 1] and batch.num_answers_P.tolist() == [2, 3]
    assert batch.length_N.tolist() == [2, 1, 3, 4, 3]
    torch.testing.assert_close(batch.score_N, torch.tensor([0.4, 0.5, 0.1, 0.2, 0.3]))
    assert {values.dtype for values in batch.columns.values()} == {torch.float32}
    assert batch.chosen_C.dtype == batch.end_row_N.dtype == batch.input_ids_RL.dtype == torch.int64
    table = DATA.comparisons
    assert table["index"].tolist() == [0, 0, 0, 0, 1] and table["share"].tolist() == [0.25] * 4 + [1]
    assert table["length_chosen"].tolist() == [3, 4, 4, 3, 1] and table["length_rejected"].tolist() == [3, 3, 3, 4, 2]
    assert table["prefix_length"].tolist() == [2, 2, 2, 2, 0]
    dummy = collate(DATA, MicroBatch(rows, is_dummy=True), layout)
    assert dummy.share_C.tolist() == [0] * 5 and torch.equal(dummy.margin_C, batch.margin_C)


def test_a_batch_moves_with_its_columns():
    batch = collate(DATA, MicroBatch([[0, 1]]), PACKED).to(torch.device("meta"))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 11 and {t.device.type for t in [*tensors, *batch.columns.values()]} == {"meta"}
    assert batch.margin_C.device.type == "meta" and batch.tree_parts == [[2, 1, 2, 1], [0, 2, 1]]
    with pytest.raises(AttributeError, match="margin_N2"):
        _ = batch.margin_N2


def test_trees_without_labels():
    batch = collate_trees([Tree(np.array([3]), [np.array([4, 5])])], MicroBatch([[7]]), PACKED)
    assert batch.input_ids_RL.tolist() == [[3, 4, 5]] and batch.chosen_C is None and batch.columns == {}
