"""Planning a run before anyone rents it: `plan` for one layout, `search` for the best ones, `largest` for a machine.

Nothing is built and no torch is needed. FLOPs of attention are causal, and so is the MFU: the masked half is not
counted. `devices.py` holds what accelerators can do, `counts.py` what our code asks of them, `plan.py` joins the two by
shares that are fitted on published runs (benchmarks/results/planner.md).
"""

from nanomai.planner import pages
from nanomai.planner.devices import DEVICES, Device, find_device
from nanomai.planner.plan import Assumptions, Plan, plan
from nanomai.planner.search import largest, search

__all__ = ["DEVICES", "Assumptions", "Device", "Plan", "find_device", "largest", "pages", "plan", "search"]
