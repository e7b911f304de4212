"""One inference from the scheduler to the last record, the same for every API."""

from collections.abc import Sequence
from typing import Protocol

from router.sim.answer import Answer, Ask, Metrics, Piece, PieceKind, compose, measure
from router.sim.driver import Busy
from router.sim.exchange import Exchange
from router.sim.prompt import Prompt
from router.sim.request import Refused
from router.sim.runner import Job

# These cut a prompt that is longer than the context; the others refuse it.
_TRUNCATING = ("/api/generate", "/v1/completions")
BUSY = "server busy, please try again.  maximum pending requests exceeded"


class Surface(Protocol):
    """How one API spells an answer. Every list item is one record."""

    @property
    def stream_type(self) -> str:
        """Content type of a stream."""
        ...

    @property
    def stream_headers(self) -> dict[str, str]:
        """Further headers of a stream."""
        ...

    @property
    def whole_type(self) -> str:
        """Content type of an answer in one piece."""
        ...

    def opening(self) -> Sequence[bytes]:
        """What comes before the first piece."""
        ...

    def piece(self, piece: Piece) -> Sequence[bytes]:
        """One piece of the answer."""
        ...

    def closing(self, answer: Answer, metrics: Metrics) -> Sequence[bytes]:
        """What comes behind the last piece."""
        ...

    def failure(self, message: str) -> bytes:
        """What is sent when a runner fails in mid-stream; empty for nothing."""
        ...

    def whole(self, answer: Answer, metrics: Metrics) -> object:
        """The answer in one piece."""
        ...


async def infer(exchange: Exchange, ask: Ask, surface: Surface) -> None:
    """Have `ask` answered through `surface`. Nothing is sent before the first token is there."""
    machine = exchange.machine
    driver = machine.driver_of(ask.model)
    answer = compose(ask, machine.spec.answer_tokens)
    job = _job(exchange, ask, answer)
    try:
        with driver.running(job):
            await driver.started(job)
            metrics = measure(job, machine.spec.handover_s)
            if ask.stream:
                await _stream(exchange, surface, job, answer, metrics)
            else:
                await driver.ended(job)
                content_type = surface.whole_type
                await exchange.whole(surface.whole(answer, metrics), content_type=content_type)
    except Busy:
        raise Refused(503, BUSY) from None


async def _stream(
    exchange: Exchange, surface: Surface, job: Job, answer: Answer, metrics: Metrics
) -> None:
    driver = exchange.machine.driver_of(job.model)
    if exchange.fault is not None:
        exchange.failure_record = surface.failure(exchange.fault.message)
    await driver.until(job.first_token_at)
    await exchange.begin(surface.stream_type, surface.stream_headers)
    for record in surface.opening():
        await exchange.record(record)
    done = 0
    for piece in answer.pieces:
        await driver.until(job.token_at(done + piece.tokens - 1))
        done += piece.tokens
        for record in surface.piece(piece):
            await exchange.record(record)
    await driver.ended(job)
    for record in surface.closing(answer, metrics):
        await exchange.record(record)
    await exchange.end()


def _job(exchange: Exchange, ask: Ask, answer: Answer) -> Job:
    spec = exchange.machine.spec
    prompt = ask.prompt
    num_ctx = spec.num_ctx(ask.model, ask.num_ctx)
    if spec.refuse_overflow and prompt.tokens > num_ctx and exchange.path not in _TRUNCATING:
        raise Refused(400, f"the prompt has {prompt.tokens} tokens, the context holds {num_ctx}")
    # Thinking is not shown to the model again, so what a next turn repeats is the content alone.
    said = answer.joined(PieceKind.CONTENT)
    return Job(
        ask.model,
        prompt_tokens=min(prompt.tokens, num_ctx),
        answer_tokens=answer.tokens,
        blocks=prompt.blocks(spec.block_tokens),
        keeps=prompt.blocks(spec.block_tokens, said),
        num_ctx=ask.num_ctx,
        options=ask.options,
        keep_alive_s=ask.keep_alive_s,
        pace=exchange.pace,
    )


async def load(exchange: Exchange, ask: Ask) -> Metrics:
    """Load the model of `ask` and nothing else."""
    job = Job(
        ask.model,
        num_ctx=ask.num_ctx,
        options=ask.options,
        keep_alive_s=ask.keep_alive_s,
        load_only=True,
        pace=exchange.pace,
    )
    return await run(exchange, job)


async def read(exchange: Exchange, ask: Ask, texts: Sequence[str]) -> Metrics:
    """Have a model read texts without answering (embeddings)."""
    num_ctx = exchange.machine.spec.num_ctx(ask.model, ask.num_ctx)
    job = Job(
        ask.model,
        prompt_tokens=sum(min(Prompt(one).tokens, num_ctx) for one in texts),
        num_ctx=ask.num_ctx,
        options=ask.options,
        keep_alive_s=ask.keep_alive_s,
        pace=exchange.pace,
    )
    return await run(exchange, job)


async def run(exchange: Exchange, job: Job) -> Metrics:
    """Put a job through the scheduler that has no answer to stream."""
    driver = exchange.machine.driver_of(job.model)
    try:
        with driver.running(job):
            await driver.ended(job)
    except Busy:
        raise Refused(503, BUSY) from None
    return measure(job, exchange.machine.spec.handover_s)
