"""The main job: `python -m llmtune.quickstart`."""

import sys

from llmtune.quickstart.job import main

if __name__ == "__main__":
    sys.exit(main())
