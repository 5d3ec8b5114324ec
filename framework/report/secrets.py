"""Keeping keys, tokens and passwords out of what a run leaves behind.

A text is a secret by its name (``--api_key=…``), by its look (``hf_…``, a private key, a password in a URL), or because
it is one that stands in the environment or among the arguments of the program.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# What stands in the place of a secret.
HIDDEN = "***"

# Parts of names, in lower case, of which one makes a value a secret.
_SECRET_WORDS = {
    "apikey",
    "auth",
    "authorization",
    "bearer",
    "cookie",
    "credential",
    "credentials",
    "dsn",
    "passphrase",
    "passwd",
    "password",
    "passwords",
    "pat",
    "pw",
    "pwd",
    "secret",
    "secrets",
    "signature",
    "token",
    "accesskey",
    "privatekey",
    "accesstoken",
    "authtoken",
    "pass",
    "jwt",
    "creds",
    "cred",
    "netrc",
}
# Pairs of such parts, the one after the other.
_SECRET_PAIRS = {
    ("access", "key"),
    ("account", "key"),
    ("api", "key"),
    ("auth", "key"),
    ("connection", "string"),
    ("encryption", "key"),
    ("license", "key"),
    ("master", "key"),
    ("private", "key"),
    ("secret", "key"),
    ("service", "key"),
    ("session", "id"),
    ("sas", "key"),
    ("shared", "key"),
    ("signing", "key"),
    ("ssh", "key"),
    ("storage", "key"),
    ("webhook", "url"),
    ("webhook", "key"),
    ("api", "keys"),
    ("sentry", "url"),
}
# A language model's tokens are none.
_PLAIN_TOKENS = {
    "additional",
    "begin",
    "bos",
    "class",
    "cls",
    "decoder",
    "end",
    "eos",
    "eot",
    "forced",
    "image",
    "mask",
    "max",
    "min",
    "new",
    "num",
    "pad",
    "per",
    "prefix",
    "sep",
    "special",
    "start",
    "stop",
    "suppress",
    "unk",
    "vocab",
}
# Parts that follow "token" where it is one of a language model: token_id, token_type, token_dropout.
_AFTER_TOKEN = {
    "classification",
    "count",
    "dim",
    "drop",
    "dropout",
    "embedding",
    "embeddings",
    "id",
    "ids",
    "length",
    "level",
    "limit",
    "mixing",
    "num",
    "size",
    "type",
    "types",
    "weight",
    "weights",
    "acc",
    "accuracy",
    "budget",
    "dict",
    "embed",
    "logits",
    "loss",
    "mask",
    "merging",
    "pooling",
    "prob",
    "probs",
    "rate",
    "shift",
    "vocab",
}
# "pass" as a verb or a noun: forward_pass, num_pass.
_PLAIN_PASSES = {
    "backward",
    "forward",
    "high",
    "low",
    "num",
    "single",
    "band",
    "first",
    "second",
    "two",
}
# And metrics of a language model: pass_rate, pass_at_1, pass@k.
_AFTER_PASS = {"at", "k", "rate", "rates", "1", "5", "10", "100", "count", "fail"}
# The same for "signature" and "auth": what a model or a function has.
_PLAIN_BEFORE = {
    "pass": _PLAIN_PASSES,
    "token": _PLAIN_TOKENS,
    "signature": {"model", "function", "call", "time", "key"},
}

_BY_LOOK = re.compile(
    r"""
    -----BEGIN[ ][A-Z0-9 ]*PRIVATE[ ]KEY(?:[ ]BLOCK)?-----
        .*?(?:-----END[ ][A-Z0-9 ]*PRIVATE[ ]KEY(?:[ ]BLOCK)?-----|\Z)         # a private key
    | \b(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}\b                                  # Amazon
    | \bhf_[A-Za-z0-9]{16,} | \bapi_org_[A-Za-z0-9]{20,}                       # Hugging Face
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_[A-Za-z0-9_]{20,}            # GitHub
    | \bgl(?:pat|dt|rt|cbt|ptt|ft|soat)-[A-Za-z0-9_-]{16,}                     # GitLab
    | \bsk-[A-Za-z0-9_-]{16,} | \b[rs]k_(?:live|test)_[A-Za-z0-9]{10,}         # OpenAI, Anthropic, Stripe
    | \bxox[abeoprs]-[A-Za-z0-9-]{8,} | \bxapp-[A-Za-z0-9-]{8,}                # Slack
    | \bAIza[A-Za-z0-9_-]{30,} | \bya29\.[A-Za-z0-9_-]{10,}                    # Google
    | \beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{6,}(?:\.[A-Za-z0-9_-]*)?           # a JSON web token
    | \bnpm_[A-Za-z0-9]{20,} | \bpypi-[A-Za-z0-9_-]{16,}                       # package registries
    | \bdapi[0-9a-f]{32} | \bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}        # Databricks, SendGrid
    | \br8_[A-Za-z0-9]{20,} | \bnvapi-[A-Za-z0-9_-]{20,}                       # Replicate, NVIDIA
    | \bgsk_[A-Za-z0-9]{20,} | \bxai-[A-Za-z0-9]{20,} | \btgp_v1_[A-Za-z0-9_-]{20,}
    | \bkey-[0-9a-f]{32}\b | \bdckr_pat_[A-Za-z0-9_-]{16,} | \bdop_v1_[a-f0-9]{32,}
    | \bwandb_v1_[A-Za-z0-9_-]{16,} | \blin_api_[A-Za-z0-9]{20,} | \bshpat_[a-fA-F0-9]{20,}
    | \b\d{6,12}:AA[A-Za-z0-9_-]{30,}                                          # Telegram
    | (?<=[?&]sig=)[^&\s"'<>]+                                                  # Azure's addresses
    | (?<=hooks\.slack\.com/)[A-Za-z0-9/_-]+
    | (?<=discord\.com/api/webhooks/)[A-Za-z0-9/_-]+
    | (?<=discordapp\.com/api/webhooks/)[A-Za-z0-9/_-]+
    """,
    re.VERBOSE | re.DOTALL,
)
# scheme://user:password@host, and scheme://token@host.
_IN_URL = re.compile(r"(?<=://)[^/\s@'\"<>]+(?=@)")
# Authorization: Bearer …
_BEARER = re.compile(r"\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
# name = value, "name": "value", name: value, --name value, ?name=value: a name, what stands between, and a value.
_ASSIGNMENT = re.compile(
    r"""(?P<name>[A-Za-z_][A-Za-z0-9_.-]*)(?P<between>["']?\s*(?::=|=>|=|:)\s*(?:[frbu]{0,2}(?=["']))?)"""
    r"""(?P<value>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|[^\s"'&,;)}\]]+)""",
    re.IGNORECASE,
)
_OPTION = re.compile(
    r"(?P<name>--?[A-Za-z][A-Za-z0-9_.-]*)(?P<between>\s+)(?P<value>[^\s-]\S*)"
)
# Values that are no secret, whatever their name.
_PLAIN_VALUES = {
    "",
    "true",
    "false",
    "none",
    "null",
    "auto",
    "yes",
    "no",
    "on",
    "off",
    HIDDEN,
}
# A value that stands elsewhere too is hidden there if it is at least so long: shorter ones are found by chance.
_LEAST_LENGTH = 8
# Characters of a text that are looked through at once: a longer search would keep other threads waiting.
_PIECE = 1 << 14


def is_secret(name: str) -> bool:
    """Whether what has this name is a key, a token or a password.

    Args:
        name: of an argument, a variable, a hyperparameter or an option.
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = [word for word in re.split(r"[^A-Za-z0-9]+", spaced.lower()) if word]
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        after = words[place + 1] if place + 1 < len(words) else ""
        if (word, after) in _SECRET_PAIRS:
            return True
        if word not in _SECRET_WORDS or before in _PLAIN_BEFORE.get(word, ()):
            continue
        if word == "token" and after in _AFTER_TOKEN:
            continue
        if word == "pass" and after in _AFTER_PASS:
            continue
        if word in ("pat", "pw") and not before:
            continue
        return True
    return False


class Secrets:
    """What must not be written, and how texts are cleaned of it.

    Args:
        environment: the environment variables: the values of those that are secrets are hidden wherever they stand.
        arguments: those of the program, likewise.
    """

    def __init__(
        self,
        environment: Mapping[str, str] = os.environ,
        arguments: Sequence[str] = (),
    ) -> None:
        self._known: set[str] = set()
        self._pattern: re.Pattern[str] | None = None
        self.learn(
            value
            for name, value in environment.items()
            # The working directory.
            if name != "PWD" and is_secret(name)
        )
        for value in environment.values():
            # A proxy's password.
            self.learn(_IN_URL.findall(value) if "@" in value else ())
        self.learn(_values_of(arguments))

    def learn(self, values: Iterable[Any]) -> None:
        """Hide these values from now on, wherever they stand."""
        for value in values:
            if isinstance(value, str) and len(value) >= _LEAST_LENGTH:
                self._known.add(value)
                # user:password, of which each may stand alone.
                tail = value.rpartition(":")[2]
                if len(tail) >= _LEAST_LENGTH:
                    self._known.add(tail)
        ordered = sorted(self._known, key=len, reverse=True)
        self._pattern = None
        if ordered:
            self._pattern = re.compile("|".join(map(re.escape, ordered)))

    def clean(self, text: str) -> str:
        """Return a text without secrets, each replaced by ``***``."""
        if "-----BEGIN" in text:
            text = _BY_LOOK.sub(HIDDEN, text)
        if len(text) <= _PIECE:
            return self._clean_piece(text)
        lines = text.splitlines(keepends=True)
        pieces = [
            line[i : i + _PIECE] for line in lines for i in range(0, len(line), _PIECE)
        ]
        return "".join(map(self._clean_piece, pieces))

    def _clean_piece(self, text: str) -> str:
        if self._pattern is not None:
            text = self._pattern.sub(HIDDEN, text)
        text = _BY_LOOK.sub(HIDDEN, text)
        if "://" in text:
            text = _IN_URL.sub(HIDDEN, text)
        text = _BEARER.sub(rf"\1\2{HIDDEN}", text)
        return _OPTION.sub(_hide_value, _ASSIGNMENT.sub(_hide_value, text))

    def clean_arguments(self, arguments: Sequence[str]) -> list[str]:
        """Return the arguments of a program without secrets: those after ``--password``, too."""
        hidden = set(_values_of(arguments))
        cleaned = []
        for argument in arguments:
            name, equals, value = argument.partition("=")
            if argument in hidden:
                cleaned.append(HIDDEN)
            elif equals and value in hidden:
                # All of it, whatever characters it has.
                cleaned.append(f"{name}={HIDDEN}")
            else:
                cleaned.append(self.clean(argument))
        return cleaned

    def clean_value(self, value: Any, name: str = "") -> Any:
        """Return a plain value without secrets: of a dict, the names count, too.

        Args:
            value: made of dicts, lists, texts and numbers.
            name: what it is called.
        """
        if isinstance(value, Mapping):
            return {
                self.clean(str(key)): self.clean_value(item, str(key))
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.clean_value(item, name) for item in value]
        is_plain = value is None or isinstance(value, bool)
        if not is_plain and is_secret(name) and str(value).lower() not in _PLAIN_VALUES:
            return HIDDEN
        return self.clean(value) if isinstance(value, str) else value


def _hide_value(match: re.Match[str]) -> str:
    """Hide the value of an assignment if its name is a secret's."""
    value = match["value"]
    bare = value.strip("\"'")
    # A call or a variable, such as os.environ["TOKEN"], tells nothing.
    is_code = value == bare and re.match(r"[A-Za-z_][\w.]*[\[(]", value) is not None
    if not is_secret(match["name"]):
        # It may hold others, as the address in --url=https://host/?token=…
        value = _ASSIGNMENT.sub(_hide_value, value)
        return f"{match['name']}{match['between']}{value}"
    if bare.lower() in _PLAIN_VALUES or is_code:
        return match[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{match['name']}{match['between']}{quote}{HIDDEN}{quote}"


def _values_of(arguments: Sequence[str]) -> list[str]:
    """The values of a program's options that are secrets: of ``--name=value``, ``--name value`` and ``name=value``."""
    found = []
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if equals and is_secret(name):
            found.append(value)
        is_option = argument.startswith("-") and not equals
        if is_option and is_secret(argument) and place + 1 < len(arguments):
            following = arguments[place + 1]
            if not following.startswith("-"):
                found.append(following)
    return [value for value in found if value.lower() not in _PLAIN_VALUES]
