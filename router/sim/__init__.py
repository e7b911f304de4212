"""A simulated Ollama node: its scheduler in any time, and a real server that may misbehave."""

from router.sim.exchange import Seen
from router.sim.faults import Fault, FaultKind
from router.sim.models import GB, PRESETS, SimModel, SimSpec
from router.sim.node import Scheduler
from router.sim.runner import Event, EventKind, Job, Phase, Resident
from router.sim.server import SimNode

__all__ = [
    "GB",
    "PRESETS",
    "Event",
    "EventKind",
    "Fault",
    "FaultKind",
    "Job",
    "Phase",
    "Resident",
    "Scheduler",
    "Seen",
    "SimModel",
    "SimNode",
    "SimSpec",
]
