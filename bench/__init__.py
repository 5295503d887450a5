"""Measurements beside TRL's SFTTrainer, a bare PyTorch loop and a whole model in memory: ``python -m bench``."""
