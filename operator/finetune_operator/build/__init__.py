"""From a plan to the Kubernetes objects of one job: pure, deterministic, dicts only. One builder per file."""

from finetune_operator.build.children import Children, build_children

__all__ = ["Children", "build_children"]
