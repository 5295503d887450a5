"""The ``finetune`` command: judge a manifest, show its plan, run it on this machine."""
