"""Choosing tokens, halting them, and packing those that are left: the door of this room. Behind it: reference/, triton/ and csrc/ under the
same name.
"""

from tokenops.ops.token_select.backends import BACKENDS as BACKENDS
from tokenops.ops.token_select.halt import halt_tokens as halt_tokens
from tokenops.ops.token_select.halt import halt_tokens_ as halt_tokens_
from tokenops.ops.token_select.masks import index_from_mask as index_from_mask
from tokenops.ops.token_select.masks import mask_from_index as mask_from_index
from tokenops.ops.token_select.pack import pack_tokens as pack_tokens
from tokenops.ops.token_select.pack import unpack_tokens as unpack_tokens
from tokenops.ops.token_select.select import select_tokens as select_tokens
