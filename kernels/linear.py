# docs: docs/kernels.md
"""What the fused losses share: the chunk of tokens, its projection, and handing over the gradients.

The losses go over the tokens in chunks. A chunk's hidden states x are projected to logits, the logits are turned into
their own gradient, and that is reduced to the two things that outlive the chunk:

    z  = x W^T          (C, V)   `project`: fp32, whatever the dtype of x and W
    dx = dz W           (C, H)   `reduce_grads`
    dW = dW + dz^T x    (V, H)   `reduce_grads`: summed in fp32 over the chunks
"""

import torch

# Room for one chunk's logits and their gradient. CUDA: 1,024 rows at V = 151,936 and 10 bytes an element, enough rows
# to fill the matrix units. CPU: 128 rows at 8 bytes; more rows gain nothing there.
WORKSPACE_BYTES = {"cuda": 1600 << 20, "cpu": 160 << 20}


def head_weight(model):
    """The `(V, H)` weight of a transformers model's output head, as the fused losses take it.

    Raises `ValueError` where the logits are more than `hidden @ weight.T` (a bias, a soft cap, a logit scale): the
    fused losses would quietly optimise another model.
    """
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError("the output head has a bias: use divergence_from_logits on the model's own logits")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1):
            raise ValueError(f"config.{name} changes the logits after the head: use divergence_from_logits")
    return head.weight


def refuse_dtensors(tensors):
    for name, tensor in tensors.items():
        if hasattr(tensor, "device_mesh"):
            raise ValueError(
                f"{name} is a DTensor, one rank's shard: compute the loss inside the module's forward, where FSDP2 has "
                "unsharded the head, or pass weight.full_tensor(grad_placements=[Partial()]), which sums over the ranks"
            )


def operand_dtype(hidden):
    """The dtype the matrix products read. They always give fp32, or fp64 where the operands are fp64 (gradcheck).

    bf16 goes to a GPU's matrix units as it is. Everything else is widened: a CPU has no bf16 product with an fp32
    result, and in fp16 a gradient divided by the token count underflows.
    """
    if hidden.dtype == torch.float64:
        return torch.float64
    dtype = hidden.dtype
    if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return torch.bfloat16 if hidden.is_cuda and dtype == torch.bfloat16 else torch.float32


def result_dtype(operand):
    return torch.float64 if operand == torch.float64 else torch.float32


def rows_per_chunk(n, bytes_per_row, workspace_bytes, device):
    """As many rows as the workspace holds, the chunks balanced, in multiples of 128 where more than 128 fit."""
    most = (workspace_bytes or WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cpu"])) // bytes_per_row
    if n <= most:
        return max(n, 1)
    most = max(most - most % 128 if most > 128 else most, 1)
    chunks = -(-n // most)
    rows = -(-n // chunks)
    return rows if most < 128 else rows + -rows % 128


def empty_logits(rows, vocab, dtype, device):
    """(rows, vocab), on CUDA widened to a multiple of 16 columns: a GPU reads 16 bytes at once only from aligned rows.

    The extra columns hold -inf: ids that no model gives any probability, so no kernel needs to know about them.
    """
    extra = -vocab % 16 if device.type == "cuda" else 0
    logits = torch.empty(rows, vocab + extra, dtype=dtype, device=device)
    logits[:, vocab:] = float("-inf")
    return logits


def project(hidden, head, logits):  # (c, H), (V, H), out: (c, V or a little more)
    out = logits[:, : head.shape[0]]
    if hidden.dtype == out.dtype:
        torch.mm(hidden, head.t(), out=out)
    else:
        torch.mm(hidden, head.t(), out_dtype=out.dtype, out=out)
    return logits


def reduce_grads(dlogits, hidden, head, needs_hidden, dhead):  # (c, V), (c, H), (V, H), dhead (V', H) -> (c, H)
    V = head.shape[0]
    dlogits = dlogits[:, :V]
    if dhead is not None:
        dhead = dhead[:V]
        if dhead.dtype == dlogits.dtype:
            dhead.addmm_(dlogits.t(), hidden)
        else:
            torch.addmm(dhead, dlogits.t(), hidden, out_dtype=dhead.dtype, out=dhead)
    return torch.mm(dlogits, head) if needs_hidden else None


def refuse_second_derivative():
    """For a backward: autograd runs it with gradients enabled only where its own result is to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError("the fused losses cannot be differentiated twice: call backward without create_graph=True")


class GradsInForward(torch.autograd.Function):
    """Ties gradients that were computed together with a scalar loss into autograd.

    The first backward scales them in place and hands them over: nothing here refers to them any more, so autograd makes
    the head's gradient, the largest tensor of all, the parameter's .grad without a copy. A further backward through a
    retained graph has nothing left to start from and computes them again: `recompute(student, head, *constants)`.
    """

    @staticmethod
    def forward(ctx, loss, grads, recompute, student, head, *constants):
        ctx.grads, ctx.recompute = grads, recompute
        ctx.save_for_backward(student, head, *constants)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        refuse_second_derivative()
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            grads = ctx.recompute(*ctx.saved_tensors)  # freed by now without retain_graph: autograd says so
        return None, None, None, *(scale_(grad, grad_loss) for grad in grads), *[None] * (len(ctx.needs_input_grad) - 5)


def scale_(grad, factor):
    return None if grad is None else grad.mul_(factor)
