"""What is updated: a registry of fine-tuning methods."""
