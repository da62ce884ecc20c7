"""A process group that a module may hold: the module can then be copied and pickled."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import torch.distributed.distributed_c10d


class Link:
    """A group of ranks. A copy is the same group; a pickle names it, and finds it again within the same job."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _link_named, (self.group.group_name,)


def _link_named(name: str) -> Link:
    c10d: Any = torch.distributed.distributed_c10d  # torch names its groups, and has no public way back
    return Link(c10d._resolve_process_group(name))
