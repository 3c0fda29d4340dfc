"""Structured logs on standard error. Prompts, tokens, keys and passwords are never logged."""

import logging
import sys

import structlog

from shared.settings import Settings


def configure_logging(settings: Settings, service: str, identity: str) -> None:
    """Set up structlog for this process; every line carries the service and its identity."""
    if settings.log_format == "json":
        renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[settings.log_level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service, identity=identity)
    # aiohttp and redis log through the standard library; their warnings belong in the same place.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
