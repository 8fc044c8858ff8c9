"""What `--additional-config '{"refreshkv": {...}}'` may say: the settings of `RefreshConfig`, and a few of the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from refreshkv.config import (
    Exact,
    RefreshConfig,
    Schedule,
    Settings,
    check_names,
    make_config,
    names_of,
    setting,
)

KEY = "refreshkv"  # in vLLM's additional config
# Of the published mode, what has no form here. Each keeps its default.
_UNSERVED = ("recent", "successor", "window", "anchor", "ring", "trigger", "drop", "score_only")
# Settings of `RefreshConfig` that have an effect here.
SERVED = tuple(
    name for name in names_of(RefreshConfig) if name not in (*_UNSERVED, *names_of(Exact))
)


@dataclass(frozen=True, kw_only=True)
class HostSettings(Settings):
    """What only a server asks.

    Attributes:
        stagger: in the published mode a row is due where the number of its tokens is a multiple of the stride, so that
            requests that begin together do not refresh together; false: the stride counts from the end of its prompt,
            as in `generate`.
        log_interval: seconds between two lines of counters in the log; 0: none.
    """

    stagger: bool = True
    log_interval: float = setting(
        10.0, "is a number of seconds from 0 to 86400", lambda s: 0 <= s <= 86400
    )


@dataclass(frozen=True)
class ServerSettings:
    """Everything that a server was told."""

    config: RefreshConfig = field(default_factory=lambda: make_config("fast"))
    host: HostSettings = field(default_factory=HostSettings)

    @property
    def words(self) -> str:
        """For a log: the mode, and every setting that it reads."""
        config, values = self.config, vars(self.config)
        unread = ("mode", *RefreshConfig.unread(values))
        read = {name: values[name] for name in SERVED if name not in unread}
        if config.mode == "full":  # a budget may be given, and is not read
            read = {}
        if config.mode == "refresh":
            read["stagger"] = self.host.stagger
        return f"mode {config.mode} {' '.join(f'{name}={value}' for name, value in read.items())}".strip()


def read(additional: object) -> ServerSettings:
    """The settings in vLLM's additional config; without any, the mixed mode of the preset "fast".

    Raises:
        ValueError: an unknown name, a value out of range, or what vLLM cannot do; in one line that says where.
    """
    given = additional.get(KEY, {}) if isinstance(additional, Mapping) else {}
    try:
        if not isinstance(given, Mapping):
            raise ValueError(f'must be an object such as {{"budget": 0.05}}; got {given!r}')
        return check(given)
    except ValueError as error:
        raise ValueError(f'--additional-config {{"{KEY}": ...}}: {error}') from None


def check(given: Mapping[str, Any]) -> ServerSettings:
    """The settings in such an object.

    Raises:
        ValueError: as `read`, in words that may follow any name.
    """
    given = dict(given)
    hosts, own = names_of(HostSettings), names_of(RefreshConfig)
    check_names("setting", given, ["preset", *hosts, *own])
    of_host = HostSettings(**{name: given.pop(name) for name in hosts if name in given})
    preset = given.pop("preset", None)
    scheduled = any(name in given for name in names_of(Schedule))
    if preset is None and "mode" not in given and not scheduled:
        preset = "fast"
    config = make_config(preset, **given)
    if config.mode == "exact":
        raise ValueError(
            "mode 'exact' drafts and verifies, which in vLLM is its own speculative decoding; "
            "set mode to 'mixed' or 'refresh'"
        )
    plain = RefreshConfig(mode=config.mode)
    for name in _UNSERVED:
        if getattr(config, name) != getattr(plain, name):
            raise ValueError(f"{name} is not available in vLLM; leave it out")
    if config.mode != "refresh" and not of_host.stagger:
        raise ValueError(f"stagger has no effect in mode {config.mode!r}; leave it out")
    return ServerSettings(config, of_host)
