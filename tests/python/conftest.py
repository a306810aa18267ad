"""Many tiny calls: threads of torch that wait for the next one must not take the cores of the tests beside them."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
