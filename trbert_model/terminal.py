"""What may reach a terminal: names, texts and errors of others can hold characters that do things to it."""

import logging


def printable(text: str) -> str:
    """A text for a terminal: line breaks stay, whatever else is no printable character is written as Python does."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = printable(logging.Formatter().formatException(record.exc_info))
        return True


def get_logger(name: str) -> logging.Logger:
    """A module's logger whose messages and tracebacks are printable, whoever shows them."""
    logger = logging.getLogger(name)
    if not any(isinstance(each, _Printable) for each in logger.filters):
        logger.addFilter(_Printable())
    return logger
