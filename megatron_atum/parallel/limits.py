"""How many files a process may have open. Imports no torch."""

from __future__ import annotations

import resource

from megatron_atum.errors import ConfigError


def files_needed(world_size: int) -> int:
    """A gloo group holds a socket for each rank, and rank 0 one more for each."""
    return 4 * world_size + 512


def allow_connections(world_size: int) -> None:
    """Raise the limit of this process, which is 1024 in login shells, and so in jobs that take it over.

    Raises:
        ConfigError: it may not be raised so far.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed, enough = files_needed(world_size), 4 * files_needed(world_size)
    most = enough if hard == resource.RLIM_INFINITY else hard
    if most < needed:
        raise ConfigError(
            f"this process may have {most} files open, and {world_size} ranks need about {needed}; raise the hard "
            "limit (ulimit -Hn; LimitNOFILE of slurmd's service, --ulimit nofile of a container)"
        )
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, enough), hard))
