"""``python -m lit_eemllm`` is the same as ``lit-eemllm``."""

import sys

from lit_eemllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
