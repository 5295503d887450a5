"""From a plan to the Kubernetes objects of one job: pure, deterministic, dicts only. One builder per file."""

from finetune_operator.build.children import Children, build_children
from finetune_operator.build.job import pods_digest

__all__ = ["Children", "build_children", "pods_digest"]
