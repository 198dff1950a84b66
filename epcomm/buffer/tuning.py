"""How many SMs operations take, recommended configurations and sizes: what does not depend on one Buffer."""

from __future__ import annotations

from typing import Any, ClassVar

from epcomm.backends import Backend
from epcomm.config import Config, combine_config, dispatch_config, low_latency_size_hint
from epcomm.errors import ShapeError

__all__ = ["Tuning"]


class Tuning:
    """The part of `epcomm.Buffer` that is about speed and sizes."""

    num_sms: ClassVar[int] = 20
    _num_sms_chosen: ClassVar[bool] = False  # by set_num_sms
    _backend: Backend

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether kernels may use SM90 features. True: they are compiled at run time for the GPU that is there."""
        return True

    @classmethod
    def set_num_sms(cls, new_num_sms: int) -> None:
        """Set how many SMs operations use by default, for all Buffers of this process.

        Any number from 1; ranks may differ. Without this call, and without a `Config`, a CUDA operation takes an equal
        part of a GPU that ranks share, at most 24 SMs. In the low-latency mode it takes 64 of a GPU that it has for
        itself, at most half of them, unless other nodes are reached through NVSHMEM. The host backend does not use it.

        Raises:
            ShapeError: below 1.
        """
        if not isinstance(new_num_sms, int) or new_num_sms < 1:
            raise ShapeError("new_num_sms", got=repr(new_num_sms), wanted="an integer of at least 1")
        Tuning.num_sms, Tuning._num_sms_chosen = new_num_sms, True

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Recommended `Config` of dispatch for a number of ranks, with the current `num_sms`."""
        return dispatch_config(num_ranks, Tuning.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Recommended `Config` of combine for a number of ranks, with the current `num_sms`."""
        return combine_config(num_ranks, Tuning.num_sms)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes to pass as `num_rdma_bytes` of a low-latency Buffer; `config.low_latency_size_hint` has the formula."""
        return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    def _num_sms(self, config: Any, is_low_latency: bool = False) -> int:
        """SMs of an operation with this config; None for the default one, as in the low-latency mode.

        The tables' own number, which nobody has chosen, gives way to an equal part of a GPU that ranks share.
        """
        if not isinstance(config, Config):
            return self._backend.num_sms(Tuning.num_sms if Tuning._num_sms_chosen else None, is_low_latency)
        if Tuning._num_sms_chosen or config.num_sms != Tuning.num_sms:
            return self._backend.num_sms(config.num_sms)
        return min(config.num_sms, self._backend.num_sms(None))
