"""Work on the tokens that changed since the last frame: the door of this room. Behind it: reference/ under the same name."""

from tokenops.ops.delta_matmul import transforms as transforms
from tokenops.ops.delta_matmul.attention import delta_attention as delta_attention
from tokenops.ops.delta_matmul.attention import delta_attention_ as delta_attention_
from tokenops.ops.delta_matmul.backends import BACKENDS as BACKENDS
from tokenops.ops.delta_matmul.gate import delta_gate as delta_gate
from tokenops.ops.delta_matmul.gate import delta_gate_ as delta_gate_
from tokenops.ops.delta_matmul.linear import gathered_linear as gathered_linear
from tokenops.ops.delta_matmul.linear import gathered_mlp as gathered_mlp
from tokenops.ops.delta_matmul.update import update_tokens as update_tokens
from tokenops.ops.delta_matmul.update import update_tokens_ as update_tokens_
from tokenops.ops.delta_matmul.window import delta_window_attention as delta_window_attention
from tokenops.ops.delta_matmul.window import delta_window_attention_ as delta_window_attention_
