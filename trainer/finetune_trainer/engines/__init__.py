"""Distributed engines: DDP, FSDP2, DeepSpeed ZeRO."""
