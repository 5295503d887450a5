"""From files to token batches."""

from finetune_trainer.data.batching import Batch, collate, deal
from finetune_trainer.data.dataset import PreparedData, Sample, TokenDataset
from finetune_trainer.data.stream import SampleStream

__all__ = ["Batch", "PreparedData", "Sample", "SampleStream", "TokenDataset", "collate", "deal"]
