"""Trains one FineTuneJob: launcher, recipe, engines, tuners, data, checkpoints, publication."""
