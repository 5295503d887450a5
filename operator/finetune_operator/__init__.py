"""The operator: turns FineTuneJobs into torchrun pods and tells the truth about them."""
