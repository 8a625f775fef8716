"""Where tests import from: the repository root comes last on sys.path.

At its front, where `python -m pytest` puts it, the root's `nodes/` would be what
ComfyUI's `import nodes` finds.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT] + [str(ROOT)]
