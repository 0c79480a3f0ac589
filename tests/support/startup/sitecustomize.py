"""Read first by every Python process that tests start; `tests/conftest.py` puts this folder in its way.

Importing vLLM makes a million objects that stay, and by default the garbage collector looks at them anew at
every 700 more: a fifth of the time that the import takes.
"""

import gc

gc.set_threshold(10_000)
