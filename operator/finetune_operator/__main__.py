"""``python -m finetune_operator --config config.json``."""

import sys

from finetune_operator.main import main

sys.exit(main())
