"""Klein KV: reference pictures of a diffusion transformer are read once, and their keys and values kept.

A model that edits with references has their tokens in every pass of every step, mostly more of them than of the picture
that it draws. FLUX.2 klein KV is trained so that references see only each other and a fixed timestep: then their keys
and values are a function of the references alone. They are computed once, stored, and put between those of text and
picture in every attention, which gives the same output. They need neither noise nor prompt, so they serve every later
request with the same references, whatever its prompt, seed or size.
"""

from lissom.diffusion.klein_kv.apply import KleinKV
from lissom.diffusion.klein_kv.hooks import KleinKVReport
from lissom.diffusion.klein_kv.store import ReferenceStore
from lissom.diffusion.klein_kv.warm import WarmReferences

__all__ = ["KleinKV", "KleinKVReport", "ReferenceStore", "WarmReferences"]
