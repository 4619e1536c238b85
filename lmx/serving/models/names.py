"""What a name in a request means. Pure, over the settings."""

from fnmatch import fnmatchcase

from lmx.config import ModelSettings

OPENAI_EMBEDDINGS = ("text-embedding-3-*", "text-embedding-ada-*")
"""What clients ask for who were never told a name."""
_ROUTERS = ("lmstudio/", "openai/")
"""What routers write before a name."""


def spellings(settings: ModelSettings, requested: str) -> list[str]:
    """The names that ``requested`` may stand for, likeliest first: itself, without a router's prefix; aliases are
    followed."""
    names = [requested]
    for prefix in _ROUTERS:
        names += [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return list(dict.fromkeys(settings.aliases.get(name, name) for name in names))


def is_placeholder(settings: ModelSettings, name: str) -> bool:
    """It means the default model, whichever that is."""
    return any(fnmatchcase(name, pattern) for pattern in settings.placeholders)


def is_embedding_placeholder(settings: ModelSettings, name: str) -> bool:
    """The same of the model for embeddings."""
    return is_placeholder(settings, name) or any(fnmatchcase(name, pattern) for pattern in OPENAI_EMBEDDINGS)
