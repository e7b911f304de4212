"""What requests hold in memory while they are answered: their bodies, and the text of answers
that another node may have to go on with. Both under one limit."""


class Kept:
    """What a client has seen of one answer. `lost`: it was given up, for want of memory or because
    the answer cannot be gone on with.

    Made by `Keep.keep`; whoever asked for it closes it."""

    __slots__ = ("_keep", "_open", "_pieces", "_weighed", "lost", "size_bytes", "take")

    def __init__(self, keep: "Keep") -> None:
        self.lost = False
        self.size_bytes = 0
        self._keep = keep
        self._open = True
        # The pieces as they came: to copy each behind the last takes three times as long, most of
        # it to move what there is into more room.
        self._pieces: list[bytes] = []
        self._weighed = 0  # so many of them
        # Adds a piece of what was relayed: no Python frame for each of every stream. Whoever
        # calls it has them weighed now and then.
        self.take = self._pieces.append

    @property
    def data(self) -> bytes:
        """All of it."""
        return b"".join(self._pieces)

    def weigh(self) -> bool:
        """Count the pieces that came since the last time; says whether more are wanted."""
        if self._open:
            new_bytes = sum(map(len, self._pieces[self._weighed :]))
            self._weighed = len(self._pieces)
            self.size_bytes += new_bytes
            self._keep.bytes += new_bytes
            self._keep.make_room()
        if not self._open:
            self._pieces.clear()
        return self._open

    def give_up(self) -> None:
        """Let go of the text: the answer cannot be gone on with any more."""
        if self._open:
            self.lost = True
            self.close()

    def close(self) -> None:
        """The answer has ended. May be called again."""
        if self._open:
            self._open = False
            self._keep.drop(self)
            self._pieces.clear()
            self.size_bytes = 0


class Keep:
    """All that is held. Over `limit_bytes` the texts kept longest are given up, bodies never:
    where they alone are over it, it is `full`. `bytes`: of both."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._bodies_bytes = 0
        self._texts: dict[Kept, None] = {}  # a set in the order they came in

    @property
    def full(self) -> bool:
        """Nothing more should be held."""
        return self._bodies_bytes > self.limit_bytes

    def reconfigure(self, limit_bytes: int) -> None:
        """Take another limit, which holds at once."""
        self.limit_bytes = limit_bytes
        self.make_room()

    def hold(self, size_bytes: int) -> None:
        """A request's body is held from now on."""
        self._bodies_bytes += size_bytes
        self.bytes += size_bytes
        self.make_room()

    def release(self, size_bytes: int) -> None:
        """And now it is not."""
        self._bodies_bytes -= size_bytes
        self.bytes -= size_bytes

    def keep(self) -> Kept:
        """Keep the text of one more answer."""
        kept = Kept(self)
        self._texts[kept] = None
        return kept

    def drop(self, kept: Kept) -> None:
        """Called by a text that closes."""
        del self._texts[kept]
        self.bytes -= kept.size_bytes

    def make_room(self) -> None:
        """Give texts up, the oldest first, until the rest is within the limit."""
        while self.bytes > self.limit_bytes and self._texts:
            next(iter(self._texts)).give_up()
