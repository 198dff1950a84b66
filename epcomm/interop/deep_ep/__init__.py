"""The names of DeepEP V1, so that a program written for its documented API changes its imports only. ::

    import epcomm.interop.deep_ep as deep_ep
    from epcomm.interop.deep_ep.utils import EventHandle, EventOverlap

What differs: errors are exceptions of `epcomm.errors` where DeepEP asserts, results come in the framework of the input
(PyTorch for PyTorch), any number of ranks is fine, and ``num_nvl_bytes`` may be 0.
"""

import torch

from epcomm.config import Config
from epcomm.event import EventOverlap
from epcomm.interop.deep_ep import utils
from epcomm.interop.deep_ep.buffer import Buffer

__all__ = ["Buffer", "Config", "EventOverlap", "topk_idx_t", "utils"]

topk_idx_t = torch.int64
"""dtype of ``topk_idx`` in DeepEP's programs. epcomm takes int32 as well."""
