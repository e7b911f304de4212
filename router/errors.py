"""The few exceptions of the shell: whose fault it was, and what the client may be told."""

from router.core.types import Failure


class ConfigError(Exception):
    """A configuration that is refused whole; `mistakes` has one readable line each."""

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


class UpstreamError(Exception):
    """An exchange with a node failed; its text may be told to the client. `logged` may stand in a
    log: it has no words of the node's, which may be those of a prompt."""

    def __init__(self, failure: Failure, told: str = "", logged: str = "") -> None:
        super().__init__(told or failure.detail or failure.kind.value)
        self.failure = failure
        self.logged = logged or failure.detail or failure.kind.value


class ClientError(Exception):
    """The client's mistake: `status` and `message` go back in the client's own dialect, or, as
    Ollama does where it has not come to know the dialect yet, in the native one.

    `last`: what follows on the connection cannot be told from a request.
    """

    def __init__(
        self, status: int, message: str, *, native: bool = False, last: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.native = native
        self.last = last
