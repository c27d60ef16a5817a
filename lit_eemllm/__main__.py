"""``python -m lit_eemllm``, or this file, is the same as ``lit-eemllm``.

Python looks for modules in the current folder first under ``-m``, and beside a file that it runs. Neither may be taken for a library,
so neither is looked at from here on; the program starts itself by this file (`lit_eemllm.console.COMMAND`).
"""

import os
import sys

if sys.path and os.path.realpath(sys.path[0] or ".") in (os.getcwd(), os.path.dirname(os.path.realpath(__file__))):
    del sys.path[0]

from lit_eemllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
