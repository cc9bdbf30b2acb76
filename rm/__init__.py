"""Reward-model training: small modules called by `train_rm.py`."""
