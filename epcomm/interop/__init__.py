"""Rooms for one framework each, and the only ones that import it: `torch`, `jax`, and `deep_ep` for DeepEP's programs.

Importing this package imports none of them. `epcomm.Buffer` takes arrays of all frameworks without these modules;
they add what only a framework's own machinery can give: gradients, and ranks that come from ``torch.distributed``.
"""
