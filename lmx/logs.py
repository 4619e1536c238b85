"""The server's log on standard error, as lines for people or as JSON, formatted and written by a thread of its own.

Whoever reads it slowly, or not at all (a pipe that nobody empties, a stopped terminal), must never hold the event loop:
what does not fit into the queue is dropped and counted, and the count is told when somebody reads again. Called by
``lmx.cli``; everybody else uses ``logging`` as ever, or structlog for lines with fields. A field may be a function
without arguments: the thread calls it, so that what takes long to say costs the event loop nothing.
"""

import copy
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue
from typing import Any, Literal, cast

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
QUEUE_RECORDS = 10_000
RECENT_LINES = 2_000
RECENT_CHARACTERS = 4_096
"""Of each of those."""
LAST_WORDS_S = 1.0
"""At the end: how long the log may wait for a reader."""
_LOOK_S = 0.1
_STDERR = 2


def _formatter(form: Literal["console", "json"]) -> logging.Formatter:
    """For records of ``logging`` and of structlog alike."""
    json: list[Processor] = [
        _say_late,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _add_time,
        ProcessorFormatter.remove_processors_meta,
        structlog.processors.EventRenamer("message"),
        structlog.processors.JSONRenderer(ensure_ascii=False),
    ]
    console: list[Processor] = [_say_late, ProcessorFormatter.remove_processors_meta, _as_line]
    return ProcessorFormatter(fmt=FORMAT if form == "console" else None, processors=json if form == "json" else console)


def _say_late(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for name, value in event.items():
        if callable(value):
            try:
                event[name] = value()
            except Exception as error:  # the thread must go on
                event[name] = f"unknown: {error!r}"
    return event


def _add_time(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    record: logging.LogRecord = event["_record"]
    created = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    # Where JSON is written the record's traceback is a field; ``logging`` itself would print it below the line.
    trace, record.exc_text = record.exc_text, None
    return {"time": created, **event} | ({"exception": trace} if trace else {})


_as_fields = structlog.processors.LogfmtRenderer(bool_as_flag=False)


def _as_line(logger: WrappedLogger, name: str, event: EventDict) -> str:
    text = str(event.pop("event"))
    return f"{text} {_as_fields(logger, name, event)}" if event else text


class Recent:
    """The last lines of the log, for those who do not read standard error. They are numbered from 0 on."""

    def __init__(self, most: int = RECENT_LINES) -> None:
        self._lines: deque[str] = deque(maxlen=most)
        self._written = 0
        self._lock = threading.Lock()
        self._listeners: set[Callable[[], None]] = set()

    def add(self, line: str) -> None:
        """For the log's thread."""
        if len(line) > RECENT_CHARACTERS:
            line = f"{line[:RECENT_CHARACTERS]}…"
        with self._lock:
            self._lines.append(line)
            self._written += 1
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def last(self, count: int) -> tuple[list[str], int]:
        """So many lines, and the number of the next one."""
        with self._lock:
            return list(self._lines)[-count:] if count else [], self._written

    def since(self, number: int) -> tuple[list[str], int, int]:
        """The lines from ``number`` on, how many of them are lost, and the number of the next one."""
        with self._lock:
            wanted = self._written - number
            lines = list(self._lines)[-wanted:] if wanted else []
            return lines, wanted - len(lines), self._written

    @contextmanager
    def listening(self, listener: Callable[[], None]) -> Iterator[None]:
        """Inside the block ``listener`` is called after each line, by the log's thread."""
        with self._lock:
            self._listeners.add(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.discard(listener)


recent = Recent()
"""Of this process's log."""


class _Writer(logging.Handler):
    """Runs in the listener's thread only, and is never inside a write that can block: ``logging`` and the interpreter
    wait for such a thread at their end."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.setFormatter(_formatter("console"))
        self.deadline = float("inf")
        self._descriptor = descriptor

    def createLock(self) -> None:
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        recent.add(line)
        data = f"{line}\n".encode(errors="backslashreplace")
        try:
            while data and time.monotonic() < self.deadline:
                _, writable, _ = select.select([], [self._descriptor], [], _LOOK_S)
                if writable:  # for so many bytes at least, if it is a pipe
                    data = data[os.write(self._descriptor, data[: select.PIPE_BUF]) :]
        except (OSError, ValueError):
            pass  # closed: nobody will ever read it


class _Queueing(QueueHandler):
    """Never waits."""

    def __init__(self, queue: "Queue[Any]") -> None:
        super().__init__(queue)
        self._dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._dropped:
                notice = f"{self._dropped} lines of the log were dropped: nobody read it"
                self.queue.put_nowait(logging.LogRecord("lmx", logging.WARNING, __file__, 0, notice, None, None))
                self._dropped = 0
            self.queue.put_nowait(record)
        except Full:
            self._dropped += 1

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """What can change is read now; the fields of structlog's records are our own and are formatted by the
        writer."""
        record = copy.copy(record)
        if isinstance(record.msg, str):
            record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text = record.exc_text or logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        return record

    def handleError(self, record: logging.LogRecord) -> None:
        """A record that cannot be formatted; the original prints it to standard error."""
        self._dropped += 1


class _Listener(QueueListener):
    def enqueue_sentinel(self) -> None:
        cast("Queue[Any]", self.queue).put(None)  # may wait: the writer gives up at its deadline


class Log:
    """The log while it is written."""

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer

    def use(self, form: Literal["console", "json"]) -> None:
        """From now on lines are written so; "console" is where it starts."""
        self._writer.setFormatter(_formatter(form))


@contextmanager
def log_to_stderr() -> Iterator["Log"]:
    """The root logger's records go to standard error inside the block, the last of them before it is left."""
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    queue: Queue[Any] = Queue(QUEUE_RECORDS)
    writer, handler = _Writer(_STDERR), _Queueing(queue)
    listener = _Listener(queue, writer)
    root = logging.getLogger()
    root.addHandler(handler)
    listener.start()
    try:
        yield Log(writer)
    finally:
        root.removeHandler(handler)
        writer.deadline = time.monotonic() + LAST_WORDS_S
        listener.stop()


def flush() -> None:
    """Wait until the log is written, for a moment at most; before an end at once."""
    deadline = time.monotonic() + _LOOK_S
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Queueing):
            while handler.queue.unfinished_tasks and time.monotonic() < deadline:  # type: ignore[attr-defined]
                time.sleep(0.001)
