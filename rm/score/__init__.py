from rm.score.loading import load_scorer as load_scorer
from rm.score.scorer import score_trees as score_trees
