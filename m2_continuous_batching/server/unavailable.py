"""Why an engine does not serve a request that is good."""


class EngineUnavailableError(RuntimeError):
    """The engine takes no request now."""


class EngineDeadError(EngineUnavailableError):
    """The engine's thread has ended with an error; only a new engine helps."""


class EngineStoppedError(EngineUnavailableError):
    """The engine is shutting down, has shut down, or was never started."""


class QueueFullError(EngineUnavailableError):
    """Too many requests wait already; later there may be room."""
