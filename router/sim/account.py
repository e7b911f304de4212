"""Who a node is to ollama.com, and which models it reaches there."""

from dataclasses import dataclass, field

from router.sim import names
from router.sim.models import SimModel, SimSpec, at_once
from router.sim.request import Refused

REMOTE_HOST = "https://ollama.com:443"
_SIGN_IN = "https://ollama.com/connect?name=sim&key=c2lt"
# Before that a cloud model had to be pulled as a stub.
_STUB_FREE = (0, 17, 6)


@dataclass(slots=True)
class Account:
    """The node's identity. `user` is empty when nobody is signed in; it outlives a restart."""

    spec: SimSpec
    user: str = field(init=False)

    def __post_init__(self) -> None:
        """Sign in as the specification says."""
        self.user = self.spec.user

    def require_user(self) -> None:
        """Raise Refused(401) when nobody is signed in."""
        if not self.user:
            raise Refused(401, "unauthorized", extra={"signin_url": _SIGN_IN}, native=True)

    def require_cloud(self, what: str) -> None:
        """Raise Refused(403) when the cloud is disabled; `what` says what is not to be had."""
        if self.spec.cloud_disabled:
            raise Refused(403, f"ollama cloud is disabled: {what}", native=True)

    def reach(self, base: str) -> SimModel | None:
        """The cloud model of a name without its suffix; None on a node too old for it.

        Raises Refused for a name that is none, and when nobody is signed in.
        """
        if names.parse(base) is None:
            raise Refused(400, "invalid model name")
        if self.spec.release < _STUB_FREE:
            return None
        self.require_user()
        return at_once(base, remote_model=base)
