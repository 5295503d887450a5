"""What a user installs: the finetune command, the Python client, the local backend."""
