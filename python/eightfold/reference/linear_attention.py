"""Linear attention with the feature map ReLU, in plain torch (Katharopoulos et al., arXiv 2006.16236; SANA, arXiv
2410.10629).

    S = S_in + sum_j relu(k_j) v_j^T    z = z_in + sum_j relu(k_j)    o_i = relu(q_i)^T S / (relu(q_i) . z + eps)

of each sample and head, in float32. Signatures are those of torch.ops.eightfold.*.
"""

import torch
from torch import Tensor

from eightfold.reference.quant import quantize


def _keys(k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """relu(k) and v in float32, zeros where the mask is False."""
    k, v = k.float(), v.float()
    if key_mask is not None:
        gone = ~key_mask[..., None, None]
        k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
    return k.relu(), v


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    state: Tensor | None = None,
    normalizer: Tensor | None = None,
    eps: float = 1e-15,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o in q's dtype, S, z): q, k, v [batch, tokens, heads, dim], key_mask [batch, tokens] of the keys that exist, S
    [batch, heads, dim, dim], z [batch, heads, dim]."""
    phi, (features, v) = q.float().relu(), _keys(k, v, key_mask)
    sums, counts = torch.einsum("bnhi,bnhj->bhij", features, v), features.sum(1)
    if state is not None:
        sums, counts = state + sums, normalizer + counts
    d = torch.einsum("bnhi,bhi->bnh", phi, counts) + eps
    out = torch.einsum("bnhi,bhij->bnhj", phi, sums) / d[..., None]
    return out.to(q.dtype).contiguous(), sums.contiguous(), counts.contiguous()


def linear_attention_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    state: Tensor | None = None,
    normalizer: Tensor | None = None,
    eps: float = 1e-15,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scales) of o as rows [batch * tokens, heads * dim] in groups (1, 128), S and z."""
    out, *states = linear_attention(q, k, v, key_mask, state, normalizer, eps)
    return *quantize(out.view(q.shape[0] * q.shape[1], q.shape[2] * q.shape[3]), [1, 128]), *states


def linear_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state_out: Tensor,
    normalizer_out: Tensor,
    key_mask: Tensor | None = None,
    dstate_out: Tensor | None = None,
    dnormalizer_out: Tensor | None = None,
    eps: float = 1e-15,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk and dv as [batch, tokens, 3, heads, dim], dS_in, dz_in) from S and z as the forward pass gave them.

    With D_i = relu(q_i) . z + eps: dn_i = dout_i / D_i, dD_i = -(o_i . dn_i); dS and dz sum relu(q_i) dn_i^T and
    relu(q_i) dD_i; S dn_i + z dD_i, dS v_j + dz and dS^T relu(k_j) are the gradients of relu(q_i), relu(k_j) and v_j.
    """
    phi, (features, values) = q.float().relu(), _keys(k, v, key_mask)
    d = (torch.einsum("bnhi,bhi->bnh", phi, normalizer_out) + eps)[..., None]
    dn = dout.float() / d
    dd = -(torch.einsum("bnhi,bhij->bnhj", phi, state_out) / d * dn).sum(-1, keepdim=True)
    dstate, dnormalizer = torch.einsum("bnhi,bnhj->bhij", phi, dn), (phi * dd).sum(1)
    if dstate_out is not None:
        dstate, dnormalizer = dstate_out + dstate, dnormalizer_out + dnormalizer
    dq = torch.einsum("bnhj,bhij->bnhi", dn, state_out) + normalizer_out[:, None] * dd
    dk = torch.einsum("bnhj,bhij->bnhi", values, dstate) + dnormalizer[:, None]
    dv = torch.einsum("bnhi,bhij->bnhj", features, dstate)
    dqkv = torch.stack((dq.masked_fill(phi <= 0, 0.0), dk.masked_fill(features <= 0, 0.0), dv), 2)
    return dqkv.to(q.dtype).contiguous(), dstate.contiguous(), dnormalizer.contiguous()
