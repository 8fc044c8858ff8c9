"""What is put on a model while it is attached, and taken away again: methods of the instance, its attention's name.

One `Attachment` a model, however many sessions there are. Each call goes to the newest session of the thread that
calls, or else to the newest of all; when the last session ends, in whatever order, the model is as it was. A copy or a
pickle of an attached model is a plain one.
"""

from __future__ import annotations

import functools
import operator
import threading
from typing import TYPE_CHECKING, Any

from refreshkv.hosts.transformers.attention import register
from refreshkv.hosts.transformers.served import IMPLEMENTATION_PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from refreshkv.hosts.transformers.attach import Session

_MARK = "_refreshkv"  # the attribute of a model that holds its attachment
_IMPLEMENTATION = "_attn_implementation_internal"
_ABSENT = object()
_lock = threading.RLock()


class Hook:
    """Stands in for a method of an attached model, and calls the session's method `on_<name>` with the original."""

    def __init__(self, attachment: Attachment, name: str) -> None:
        self._attachment = attachment
        self._name = name
        self._before = vars(attachment.model).get(name, _ABSENT)
        plain = getattr(attachment.model, name)
        functools.update_wrapper(self, plain, updated=())
        self._plain = plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self._attachment.current()
        if session is None:  # somebody kept this longer than the attachment
            return self._plain(*args, **kwargs)
        return getattr(session, f"on_{self._name.lstrip('_')}")(self._plain, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """In a copy of the model, and where it is unpickled: its own method, or what the instance had in its place."""
        if self._before is _ABSENT:
            return getattr, (self._attachment.model, self._name)
        return operator.getitem, ((self._before,), 0)

    def restore(self) -> None:
        """The model gets back what it had, unless somebody has replaced ours since."""
        model = self._attachment.model
        if vars(model).get(self._name) is self:
            delattr(model, self._name)
            if self._before is not _ABSENT:
                setattr(model, self._name, self._before)


class Attachment:
    """The sessions of one model, oldest first.

    Attributes:
        model: the attached model.
        decoder: its text config, which names the attention implementation.
        below: the attention implementation that serves prefill and the layers that are not ours.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.decoder = model.config.get_text_config(decoder=True)
        self._implementation = getattr(self.decoder, _IMPLEMENTATION)
        self.below: str = self._implementation or "eager"
        if self.below.startswith(IMPLEMENTATION_PREFIX):
            raise RuntimeError(
                "this model shares its config with an attached model: give it a copy of its own"
            )
        self._sessions: list[tuple[int, Session]] = []
        setattr(self.decoder, _IMPLEMENTATION, register(self.below))
        self._hooks = [Hook(self, name) for name in HOOKED]
        for name, hook in zip(HOOKED, self._hooks, strict=True):
            setattr(model, name, hook)
        setattr(model, _MARK, self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has no attachment (the result is None) and its own attention implementation again."""
        return setattr, (self.decoder, _IMPLEMENTATION, self._implementation)

    def current(self) -> Session | None:
        """The session that a call belongs to."""
        sessions, own = list(self._sessions), threading.get_ident()
        for thread, session in reversed(sessions):
            if thread == own:
                return session
        return sessions[-1][1] if sessions else None

    def add(self, session: Session) -> None:
        """The newest session, of this thread."""
        self._sessions.append((threading.get_ident(), session))

    def end(self, *sessions: Session) -> None:
        """End some sessions, none: all of them; with the last the model is restored."""
        with _lock:
            left = [entry for entry in self._sessions if sessions and entry[1] not in sessions]
            if self._sessions and not left:
                for hook in self._hooks:
                    hook.restore()
                setattr(self.decoder, _IMPLEMENTATION, self._implementation)
                delattr(self.model, _MARK)
            self._sessions = left

    def holds(self, session: Session) -> bool:
        """Whether a session has not ended."""
        return any(held is session for _, held in self._sessions)


# Each has its `on_...` in `Session`.
HOOKED = (
    "generate",
    "_extract_generation_mode_kwargs",
    "_prepare_cache_for_generation",
    "_prefill",
    "_valid_auto_compile_criteria",
    "get_compiled_call",
)


def attachment_of(model: PreTrainedModel) -> Attachment | None:
    """What holds the sessions of a model; `None` where there are none."""
    return vars(model).get(_MARK)


def join(model: PreTrainedModel, session: Session) -> Attachment:
    """Add a session to a model, attached before or not.

    Raises:
        RuntimeError: another attached model has the same config object.
    """
    with _lock:
        attachment = attachment_of(model) or Attachment(model)
        attachment.add(session)
        return attachment
