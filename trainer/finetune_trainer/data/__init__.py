"""From files to token batches."""

from finetune_trainer.data.batching import Batch, collate, deal
from finetune_trainer.data.chat import DEFAULT_CHAT_TEMPLATE
from finetune_trainer.data.dataset import PreparedData, Sample, TokenDataset
from finetune_trainer.data.prepare import prepare
from finetune_trainer.data.stream import SampleStream
from finetune_trainer.data.tokenizing import check_tokenizer, load_tokenizer

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "Batch",
    "PreparedData",
    "Sample",
    "SampleStream",
    "TokenDataset",
    "check_tokenizer",
    "collate",
    "deal",
    "load_tokenizer",
    "prepare",
]
